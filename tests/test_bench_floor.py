"""The floor of `ldm bench` and its random weights: arithmetic counted right, models that diffusers reads as we do."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load
from oracle.comparing import relative

from ldmcli.bench import floor, model_folder, random_weights
from ldmcli.bench.floor import Flops, Product, count_flops, largest_products, measure_rate
from ldmcli.bench.random_weights import FAMILIES, family_config, model_shapes, size_on_disk, write_random_config
from ldmcli.checkpoints import source
from ldmcli.checkpoints.files import open_weights, read_tensors
from ldmcli.config import ModelConfig, UNetConfig, VAEConfig
from ldmcli.errors import CannotCreateError, StorageError, UsageError

GIGA = 1e9
# Of the published models: parameters of U-Net and VAE, then of all text encoders.
PARAMETERS = {
    "sd15": (859_520_964, 83_653_863, 123_060_480),
    "sd21": (865_910_724, 83_653_863, 340_387_840),
    "sdxl": (2_567_463_684, 83_653_863, 123_060_480 + 694_659_840),
}


def small(family: str) -> ModelConfig:
    """A family's configuration, only narrower and with pictures of 64 pixels; all that makes the family stays."""
    config = family_config(family)
    texts = tuple(
        dataclasses.replace(text, hidden_size=64 * (i + 1), intermediate_size=96, layers=3, heads=i + 1)
        for i, text in enumerate(config.text_encoders)
    )
    xl = bool(config.unet.added_numbers)
    if xl:  # the pooled prompt gets a width of its own
        texts = (texts[0], dataclasses.replace(texts[1], projection_dim=96))
    return dataclasses.replace(
        config,
        unet=dataclasses.replace(
            config.unet,
            sample_size=8,
            block_channels=(32, 64, 96) if xl else (32, 64, 96, 96),
            attention=(0, 1, 2) if xl else config.unet.attention,
            middle_attention=2 if xl else 1,
            heads=(1, 2, 3) if xl else (2, 2, 3, 3),
            context_dim=sum(text.hidden_size for text in texts),
            pooled_dim=96 if xl else 0,
        ),
        vae=dataclasses.replace(config.vae, block_channels=(32, 32, 64, 64)),
        text_encoders=texts,
    )


@pytest.fixture(scope="module", params=FAMILIES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Path]:
    """A small model of each family, and its folder."""
    config = small(request.param)
    return config, write_random_config(config, tmp_path_factory.mktemp("random") / request.param)


# Counting


def conv(size: int, into: int, out: int, pixels: int) -> int:
    return 2 * size * size * into * out * pixels


def resnet(into: int, out: int, pixels: int, time: int = 0) -> int:
    shortcut = conv(1, into, out, pixels) if into != out else 0
    return conv(3, into, out, pixels) + conv(3, out, out, pixels) + shortcut + 2 * time * out


def attention(queries: int, keys: int, channels: int) -> int:
    return 2 * 2 * queries * keys * channels


def transformer(c: int, pixels: int, tokens: int) -> int:
    around = 2 * 2 * c * c * pixels
    to_itself = 4 * 2 * c * c * pixels + attention(pixels, pixels, c)
    to_text = 2 * 2 * c * c * pixels + attention(pixels, tokens, c)
    widened = 2 * c * 8 * c * pixels + 2 * 4 * c * c * pixels
    return around + to_itself + to_text + widened


def test_tiny_model_counts_as_by_hand() -> None:
    # One level of 16 channels with a resnet and a transformer, the same in the middle, two of each on the way up; the
    # VAE's one level has two resnets on the way to the pixels, all of them as many as latents.
    c, v, n, m = 16, 8, 6 * 4, 77
    base = family_config("sd15")
    config = dataclasses.replace(
        base,
        unet=UNetConfig(
            block_channels=(c,), attention=(1,), heads=(2,), layers_per_block=1, context_dim=24, norm_groups=4
        ),
        vae=VAEConfig(block_channels=(v,), layers_per_block=1, norm_groups=4),
        text_encoders=(dataclasses.replace(base.text_encoders[0], hidden_size=24, intermediate_size=40, layers=3),),
    )
    way_up = 2 * resnet(2 * c, c, n, 4 * c)
    resnets = 3 * resnet(c, c, n, 4 * c) + way_up
    unet = conv(3, 4, c, n) + resnets + 4 * transformer(c, n, m) + conv(3, c, 4, n)
    vae = conv(1, 4, 4, n) + conv(3, 4, v, n) + 4 * resnet(v, v, n) + 4 * conv(1, v, v, n) + attention(n, n, v)
    text = 3 * (4 * 2 * m * 24 * 24 + 2 * 2 * m * 24 * 40 + attention(m, m, 24))
    assert count_flops(config, 6, 4) == Flops(
        unet=unet,
        vae=vae + conv(3, v, 3, n),
        text=text,
        context=4 * 2 * 2 * m * 24 * c,
        unet_attention=4 * (attention(n, n, c) + attention(n, m, c)),
        unet_convolution=unet - 5 * 2 * 4 * c * c - 4 * transformer(c, n, m) + 4 * 2 * conv(1, c, c, n),
        vae_attention=attention(n, n, v),
    )


@pytest.mark.parametrize(
    ("family", "size", "unet", "vae", "text"),
    [("sd15", 512, 803, 2514, 13.3), ("sdxl", 1024, 6761, 10470, 110)],
)
def test_published_models_take_what_is_known(family: str, size: int, unet: float, vae: float, text: float) -> None:
    flops = count_flops(family_config(family), size, size)
    # Whoever computes keys and values of the prompt in every step counts them there.
    assert flops.unet + flops.context == pytest.approx(unet * GIGA, rel=0.005)
    assert flops.vae == pytest.approx(vae * GIGA, rel=0.005)
    assert flops.text == pytest.approx(text * GIGA, rel=0.005)
    assert 0.1 < flops.unet_attention / flops.unet < 0.2


def test_arithmetic_does_not_depend_on_how_attention_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("sd15")
    expected = count_flops(config, 64, 64)

    def nothing(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return query

    monkeypatch.setattr("ldmcli.networks.attention.sdpa_attention", nothing)
    assert count_flops(config, 64, 64) == expected


# Measuring


def test_largest_products_are_the_models_own() -> None:
    products = largest_products(family_config("sd15"), 512, 512)
    convs, linears = products[:3], products[3:]
    assert {product.weight for product in convs} == {(c, c, 3, 3) for c in (320, 640, 1280)}
    assert {product.weight for product in linears} == {(8 * c, c) for c in (320, 640, 1280)}
    assert Product((320, 320, 3, 3), 64, 64) in convs
    assert convs[0].flops == conv(3, 320, 320, 2 * 64 * 64)


def test_long_products_are_cut_to_fewer_rows() -> None:
    product = Product((8, 8, 3, 3), 64, 32)
    assert floor._cut(product, product.flops) == product
    half = floor._cut(product, product.flops / 2)
    assert (half.height, half.width, half.flops) == (32, 32, product.flops // 2)
    assert floor._cut(product, 1).height == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rate_is_the_best_of_all_products(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(floor, "_SECONDS", 0.01)
    monkeypatch.setattr(floor, "_FIRST_CALL", 1e6)
    seen: list[int] = []
    best_rate = floor._best_rate

    def watched(product: Product, *rest: Any) -> float:
        seen.append(torch.get_num_threads())
        return best_rate(product, *rest)

    monkeypatch.setattr(floor, "_best_rate", watched)
    before = torch.get_num_threads()
    rate = measure_rate(small("sd15"), 64, 64, dtype, torch.device("cpu"), threads=before + 1)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before
    assert len(rate.all) == 7
    assert rate.flops_per_second == rate.all[rate.product] == max(rate.all.values()) > 0


def test_a_runner_computes_the_product_that_is_counted() -> None:
    cpu = torch.device("cpu")
    assert floor._runner(Product((6, 4, 3, 3), 16, 8), torch.float32, cpu)().shape == (2, 6, 16, 8)
    rows = floor._runner(Product((6, 4), 16, 1), torch.float32, cpu)()
    assert rows.shape == (32, 6)
    assert 0.3 < rows.std() < 3


# Random weights


@pytest.mark.parametrize("family", FAMILIES)
def test_true_shapes(family: str) -> None:
    shapes = model_shapes(family_config(family))
    count = {part: sum(int(np.prod(shape)) for shape in of_part.values()) for part, of_part in shapes.items()}
    texts = sum(count[part] for part in count if part.startswith("text_encoder"))
    assert (count["unet"], count["vae"], texts) == PARAMETERS[family]
    assert size_on_disk(family) == 2 * sum(PARAMETERS[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_true_folders_are_read_as_their_family(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By this program, and by diffusers and transformers to the same networks: all but the weights is written."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = family_config(family)
    model_folder.write_description(config, tmp_path)
    model_folder.write_index(config, tmp_path)
    monkeypatch.setattr(source, "open_part", lambda *args, **settings: [])
    found = source.open_model(tmp_path)
    assert found.config == config
    assert found.tokenizers[-1].pad_id == (49407 if family == "sd15" else 0)
    with torch.device("meta"):
        modules: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(tmp_path / "unet")),
            "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(tmp_path / "vae")),
        }
        for text in config.text_encoders:
            build = CLIPTextModelWithProjection if text.projection_dim else CLIPTextModel
            modules[text.part] = build(CLIPTextConfig.from_pretrained(tmp_path / text.part))
    for part, shapes in model_shapes(config).items():
        theirs = {key: tuple(tensor.shape) for key, tensor in modules[part].state_dict().items()}
        ours = {key if key in theirs else key.removeprefix("text_model."): shape for key, shape in shapes.items()}
        assert ours == theirs, part


def test_weights_are_finite_and_of_order_one(written: tuple[ModelConfig, Path]) -> None:
    config, folder = written
    opened = source.open_model(folder)
    assert opened.config == config
    for part in opened.parts:
        (file,) = opened.files(part)
        assert file.metadata == {"format": "pt"}
        assert {info.dtype for info in file.tensors.values()} == {"F16"}
        for name, tensor in read_tensors(file, file.tensors, "cpu", torch.float32):
            if tensor.numel() < 500:
                continue
            fan_in = 1 if tensor.ndim == 1 or name.endswith("_embedding.weight") else tensor[0].numel()
            gain = 1 / 0.596 if (part, name) == ("unet", "conv_out.weight") else 1
            wanted = 0.1 if tensor.ndim == 1 else gain * fan_in**-0.5
            assert float(tensor.std()) == pytest.approx(wanted, rel=0.15), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_activations_keep_their_size(written: tuple[ModelConfig, Path], dtype: str, one_thread: None) -> None:
    prediction, image = run_ours(*written, dtype=dtype)
    assert 0.7 < float(prediction.std()) < 1.4
    assert 0.2 < float(image.std()) < 2


def test_diffusers_computes_the_same(written: tuple[ModelConfig, Path], one_thread: None) -> None:
    import diffusers

    config, folder = written
    xl = bool(config.unet.added_numbers)
    name = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    settings: dict[str, Any] = {"add_watermarker": False} if xl else {"safety_checker": None}
    theirs = getattr(diffusers, name).from_pretrained(folder, local_files_only=True, **settings)
    theirs = theirs.to("cpu", torch.float32)
    latents, context, pooled = inputs(config)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])} if xl else None
    with torch.no_grad():
        prediction = theirs.unet(latents, 500, context, added_cond_kwargs=added).sample
        image = theirs.vae.decode(latents).sample
    ours = run_ours(config, folder)
    assert relative(ours[0], prediction) < 1e-5
    assert relative(ours[1], image) < 1e-5
    # Text, tokenizer and padding included.
    with torch.no_grad():
        encoded = theirs.encode_prompt(
            "a red apple", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    (conditioning,) = load(folder).model.prompts.encode(["a red apple"])
    assert relative(conditioning.context, encoded[0]) < 1e-5
    if xl:
        assert conditioning.pooled is not None
        assert relative(conditioning.pooled, encoded[2]) < 1e-5
        assert theirs.config.force_zeros_for_empty_prompt


def inputs(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, context and pooled prompt, the same every time."""
    generator = torch.Generator().manual_seed(1)
    shapes = (1, 4, 8, 8), (1, 77, config.unet.context_dim), (1, config.unet.pooled_dim)
    latents, context, pooled = (torch.randn(shape, generator=generator) for shape in shapes)
    return latents, context, pooled


@torch.inference_mode()
def run_ours(config: ModelConfig, folder: Path, dtype: str = "fp32") -> tuple[torch.Tensor, torch.Tensor]:
    """This program's noise prediction at time step 500, and the picture that the VAE makes of the same latents."""
    pipeline = load(folder, dtype)
    unet = pipeline.model.unet
    of_type = next(unet.parameters()).dtype
    latents, context, pooled = (tensor.to(of_type) for tensor in inputs(config))
    time = unet.embed_time(torch.tensor([500.0]))
    if config.unet.added_numbers:
        time = time + unet.embed_added(pooled, torch.tensor([[64.0, 64, 0, 0, 64, 64]]))
    prediction = unet(latents, time, unet.project_context(context))
    image = pipeline.vae.decode(latents.to(next(pipeline.vae.parameters()).dtype))
    return prediction.float(), image.float()


def test_long_tensors_read_the_drawn_numbers_round_and_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights, "_PERIOD", 1009)
    noise = random_weights._Noise(seed=3)
    (first, *_), shape = noise.pieces("unet", "other", (2, 5)), (40, 64)
    pieces = list(noise.pieces("unet", "some.weight", shape))
    numbers = np.concatenate(pieces).astype(np.float32) * 8  # 1/√64 is taken off
    assert len(numbers) == 40 * 64
    start = next(i for i in range(1009) if np.allclose(noise._drawn[i], numbers[0], rtol=1e-3))
    expected = np.take(noise._drawn, np.arange(start, start + len(numbers)), mode="wrap")
    np.testing.assert_allclose(numbers, expected, rtol=2e-3, atol=1e-5)
    rows = numbers.reshape(shape)
    assert np.abs(np.corrcoef(rows) - np.eye(40)).max() < 0.9
    assert not np.allclose(first[:2].astype(np.float32) * 5**0.5, numbers[:2], rtol=1e-2)


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    config = small("sd15")
    one, again, other = (
        write_random_config(config, tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) == 12
    assert [(one / file).read_bytes() for file in files] == [(again / file).read_bytes() for file in files]
    weights = Path("unet", "diffusion_pytorch_model.safetensors")
    assert (one / weights).read_bytes() != (other / weights).read_bytes()
    assert open_weights(one / weights).tensors == open_weights(other / weights).tensors


def test_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'sd3'; choose sd15, sd21, sdxl"):
        random_weights.write_random_model("sd3", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_disk_too_small_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000_000))
    with pytest.raises(StorageError, match=r"take 2\.1 GB, and the disk of .* has 1\.0 GB free"):
        random_weights.write_random_model("sd15", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "unet").write_text("")
    with pytest.raises(CannotCreateError, match="unet"):
        write_random_config(small("sd15"), tmp_path)


def test_a_model_half_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_random_config(small("sd15"), tmp_path)
    json.loads((folder / "model_index.json").read_text())

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(random_weights, "_write_all", stop)
    with pytest.raises(KeyboardInterrupt):
        write_random_config(small("sd15"), folder)
    assert not (folder / "model_index.json").exists()
    assert not list(folder.rglob("*.part"))


def test_the_names_of_the_families_need_no_torch() -> None:
    program = (
        "import sys\n"
        "from ldmcli.bench.random_weights import FAMILIES\n"
        "assert FAMILIES == ('sd15', 'sd21', 'sdxl')\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'diffusers', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
