"""What goes wrong between commands and their server: ends and signals on both sides, other versions, other users."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import stat
import struct
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cli_support import assert_refused, copy_model, ldm, ldm_here, start, status_of, tiny_model, until
from control_support import random_control, write
from PIL import Image
from test_serving import FAST, Served

from ldmcli import GenerationRequest
from ldmcli.checkpoints.source import open_model
from ldmcli.control import Control
from ldmcli.errors import CannotCreateError, UsageError
from ldmcli.fitting import fit_to_model
from ldmcli.image_prompt import ImagePrompt
from ldmcli.images.metadata import read_record
from ldmcli.serving import connection, place
from ldmcli.serving.place import is_private, is_safe, listening, peer_is_user, socket_path
from ldmcli.serving.wire import fitted_from_dict, receive, send
from ldmcli.spec import LoRA

LONG = ("txt2img", "a red apple", "-m", str(tiny_model()), "--dtype", "fp32", "--device", "cpu", "-s", "1")
GONE = "ldm: warning: the server is gone; going on without it"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.sock"


@pytest.fixture
def served(path: Path):  # type: ignore[no-untyped-def]
    server = Served(path)
    yield server
    server.process.kill()
    server.process.communicate()


def doomed(served: Served, path: Path, *, pictures: int = 0) -> dict[str, str]:
    """Where a command finds the server, which is killed as it draws, after so many pictures: what passes between them
    goes through here, so that this is never too late."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def pass_on() -> None:
        client, server, left = listener.accept()[0], socket.socket(socket.AF_UNIX), pictures
        server.connect(served.env["LDM_SERVER"])
        threading.Thread(target=copy, args=(client, server), daemon=True).start()
        with listener, client, server:
            while True:
                message = receive(server)
                if left == 0 and message.get("event") == "step" and message["done"]:
                    break
                left -= message.get("event") == "picture"
                send(client, message)
            served.process.kill()
            served.process.wait()
            client.shutdown(socket.SHUT_RDWR)

    def copy(client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)

    threading.Thread(target=pass_on, daemon=True).start()
    return {"LDM_SERVER": str(path)}


def drawing(served: Served) -> bool:
    return served.status()["step"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_client_that_ends_takes_its_work_along(number: int, served: Served, tmp_path: Path) -> None:
    client = start(*LONG, "--steps", "900", env=served.env, cwd=tmp_path)
    until(lambda: drawing(served), "the server draws")
    client.send_signal(number)
    client.communicate(timeout=60)
    assert status_of(client) == 128 + number
    until(lambda: served.status()["steps"] == 0, "the server stops drawing")
    assert served.status()["clients"] == 0
    done = ldm(*LONG, "--steps", "1", "-o", "a.png", env=served.env, cwd=tmp_path)
    assert done.code == 0
    assert served.status()["drawn"] == 1


def test_a_command_goes_on_where_its_server_is_killed(served: Served, path: Path, tmp_path: Path) -> None:
    done = ldm(*LONG, "--steps", "9", "-c", "2", "-o", "with", env=doomed(served, tmp_path / "d.sock"), cwd=tmp_path)
    assert (done.code, done.err.splitlines()) == (0, [GONE])
    assert ldm_here(*LONG, "--steps", "9", "-c", "2", "-o", "without", cwd=tmp_path).code == 0
    for seed in (1, 2):
        pictures = [tmp_path / folder / f"ldm-{seed}.png" for folder in ("with", "without")]
        assert pictures[0].read_bytes() == pictures[1].read_bytes()
    # Its socket is left behind, which keeps nobody from drawing nor another server from listening.
    assert path.exists()
    assert ldm_here(*LONG, "--steps", "1", "-o", "a.png", env=served.env, cwd=tmp_path).err == ""
    again = Served(path)
    assert again.status()["drawn"] == 0
    again.end()


def test_a_batch_loses_nothing_with_its_server(served: Served, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("an apple\na pear\na fox\n")
    options = ("--dtype", "fp32", "--device", "cpu", "--steps", "9", "-b", "1", "-m", tiny_model(), "--json")
    env = doomed(served, tmp_path / "d.sock", pictures=1)
    done = ldm("batch", "rows.txt", "-o", "out", *options, env=env, cwd=tmp_path)
    assert done.code == 0, done
    assert [record["status"] for record in done.records] == ["done"] * 3
    assert GONE in done.err
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 3


def test_two_servers_do_not_share_a_place(served: Served) -> None:
    assert_refused(ldm("serve", env=served.env), 75, "running already")
    assert served.status()["clients"] == 0


def test_a_server_takes_the_place_of_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a picture")
    (tmp_path / "link").symlink_to("a.png")
    (tmp_path / "folder").mkdir()
    for name in ("a.png", "link", "folder"):
        env = {"LDM_SERVER": str(tmp_path / name)}
        assert_refused(ldm_here("serve", "--idle", "1s", env=env), 73, "no socket")
    assert (tmp_path / "link").read_bytes() == b"a picture"
    assert len(list(tmp_path.iterdir())) == 3
    with socket.socket(socket.AF_UNIX) as others:
        others.bind(str(tmp_path / "s"))
        others.listen()
        refused = ldm_here("serve", "--idle", "1s", env={"LDM_SERVER": str(tmp_path / "s")})
    assert_refused(refused, 73, "another program's")
    assert (tmp_path / "s").is_socket()


def test_a_server_that_is_held_keeps_nobody(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_GREETING_S", 0.5)
    served.process.send_signal(signal.SIGSTOP)
    done = served.run("txt2img", "a fox", "-m", tiny_model(), *FAST, "-o", tmp_path / "a.png")
    served.process.send_signal(signal.SIGCONT)
    assert done.code == 0
    assert done.err.splitlines() == [f"ldm: warning: the server at {served.env['LDM_SERVER']} does not answer"]


def test_a_server_is_told_of_and_stopped(path: Path) -> None:
    served = Served(path)
    told = ldm_here("serve", "--status", "--json", env=served.env)
    facts = json.loads(told.out)
    assert (told.code, facts["pid"], facts["agrees"], facts["models"]) == (0, served.process.pid, True, [])
    assert re.search(rb"^drawn: +0$", ldm_here("serve", "--status", env=served.env).out, re.MULTILINE)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ldm_here("serve", "--stop", env=served.env).code == 0
    assert served.process.wait(60) == 0
    assert not path.exists()
    for option in ("--status", "--stop"):
        assert_refused(ldm_here("serve", option, env=served.env), 66, "no server")


def test_a_server_without_work_ends(path: Path, tmp_path: Path) -> None:
    served = Served(path, "--idle", "1s", "-m", str(tiny_model()))
    until(lambda: ldm_here("serve", "--status", env=served.env).code == 66, "its end, for all that it is asked")
    assert served.process.wait(60) == 0
    assert not path.exists()


def test_a_command_may_leave_a_server_behind(path: Path, tmp_path: Path) -> None:
    env = {"LDM_SERVER": str(path), "LDM_KEEP": "60s"}
    first = ldm(*LONG, "--steps", "2", "-o", "a.png", env=env, cwd=tmp_path)
    facts = json.loads(ldm_here("serve", "--status", "--json", env=env).out)
    second = ldm(*LONG, "--steps", "2", "-o", "b.png", env=env, cwd=tmp_path)
    assert (first.code, second.code, facts["drawn"], facts["models"]) == (0, 0, 1, ["tiny"])
    assert "ldm: starting a server that ends after 60 s without work" in first.err
    assert "starting" not in second.err
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert json.loads(ldm_here("serve", "--status", "--json", env=env).out)["drawn"] == 2
    assert ldm_here("serve", "--stop", env=env).code == 0
    until(lambda: not path.exists(), "the server ends")


def test_a_server_that_cannot_be_left_behind_is_missed(tmp_path: Path) -> None:
    env = {"LDM_SERVER": str(tmp_path / "nowhere" / "deep" / "s"), "LDM_KEEP": "60s"}
    done = ldm_here(*LONG, "--steps", "1", "-o", tmp_path / "a.png", env=env)
    assert done.code == 0
    assert "warning: no server could be left behind; ldm serve says why" in done.err


def test_a_server_of_another_version_is_left_alone(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("txt2img", "a fox", "-m", tiny_model(), *FAST, "-o", tmp_path / "a.png")
    monkeypatch.setattr(place, "__version__", "0.0.1")
    assert served.run(*command).code == 0
    assert json.loads(ldm_here("serve", "--status", "--json", env=served.env).out)["agrees"] is False
    monkeypatch.undo()
    assert served.status()["drawn"] == 0
    other = ldm_here(*command, "--overwrite", env=served.env | {"OMP_NUM_THREADS": "2"})  # which may round otherwise
    assert (other.code, served.status()["drawn"]) == (0, 0)


def test_a_model_whose_file_changes_is_read_anew(served: Served, tmp_path: Path) -> None:
    model, records = copy_model(tmp_path / "model"), []
    for name in ("a.png", "b.png"):
        assert served.run("txt2img", "a fox", "-m", model, *FAST, "-o", tmp_path / name).code == 0
        records.append(read_record(tmp_path / name)["model"]["sha256"])
        weights = model / "vae" / "diffusion_pytorch_model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-2] ^= 1
        weights.unlink()
        weights.write_bytes(data)
    assert served.status()["drawn"] == 2
    assert records[0] != records[1]


def test_a_network_whose_file_changes_is_read_anew(served: Served, tmp_path: Path) -> None:
    unet, net, hint, drawn = open_model(tiny_model()).config.unet, tmp_path / "net.safetensors", tmp_path / "h.png", []
    Image.new("RGB", (16, 16), "white").save(hint)
    for seed in (1, 2):
        net.unlink(missing_ok=True)
        write(net, random_control(unet, seed=seed).state_dict())
        command = ("txt2img", "a fox", "-m", tiny_model(), *FAST, "--no-metadata", "-o", "-")
        command = (*command, "--control-net", net, "--control-image", hint)
        drawn.append(served.run(*command).out)
        assert drawn[-1] == ldm_here(*command).out
    assert served.status()["drawn"] == 2
    assert drawn[0] != drawn[1]


def test_a_request_arrives_as_it_was_sent() -> None:
    control, lora, inputs = Control("net", "a.png", canny=(1, 2)), LoRA("a", 0.5), (("image", "0" * 64),)
    asked = GenerationRequest("a fox", loras=(lora,), control_net=("net",), control_image=("a.png",), canny=("1,2",))
    fitted = fit_to_model(asked, open_model(tiny_model()).config)
    lists = {"controls": (control,), "image_prompts": (ImagePrompt("adapter", b"data"),), "loras": (lora,)}
    fitted = dataclasses.replace(fitted, **lists, embeddings=("a",), inputs=inputs)
    assert all(value for value in vars(fitted).values() if isinstance(value, tuple))  # none goes unlooked at
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, {"request": fitted})
        assert fitted_from_dict(receive(theirs)["request"]) == fitted


def test_many_clients_at_once_each_get_their_own(served: Served, tmp_path: Path) -> None:
    def draw(seed: int) -> bytes:
        name = tmp_path / f"{seed}.png"
        command = ("txt2img", f"a fox {seed % 3}", "-m", tiny_model(), "--steps", "3", "-s", str(seed), "-o", name)
        done = ldm(*command, "--dtype", "fp32", "--device", "cpu", "--overwrite", env=served.env)
        assert done.code == 0, done.err
        return name.read_bytes()

    def memory() -> int:
        text = Path(f"/proc/{served.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS")))

    with ThreadPoolExecutor(8) as threads:
        first = list(threads.map(draw, range(8)))
        before = memory()
        again = list(threads.map(draw, range(8)))
    assert len(set(first)) == 8
    assert again == first
    assert memory() - before < 64 << 10
    assert served.status()["drawn"] == 16
    assert served.status()["clients"] == 0
    served.env = {}
    assert draw(3) == first[3]


def test_what_is_no_message_harms_nobody(served: Served, path: Path) -> None:
    text = b'{"hello": 1}'
    for sent in (
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("!IQ", 1 << 31, 0),
        struct.pack("!IQ", 4, 1 << 60),
        struct.pack("!IQ", 9, 0) + b"[" * 9,
        struct.pack("!IQ", 2, 0) + b"[]",
        struct.pack("!IQ", len(text), 0) + text + struct.pack("!IQ", 15, 0) + b'{"call":"open"}',
    ):
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as client:
            client.connect(str(path))
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            client.settimeout(60)
            with contextlib.suppress(ConnectionError):
                while client.recv(4096):
                    pass
    with contextlib.closing(served.connect()) as asked:
        for wrong in ({"requests": []}, {"model": 3}, {}):
            with pytest.raises(connection.RefusedError):
                asked.call("draw", **wrong)
        for name in ("nothing", "__init__", "fit", "cut_text", "load", "enlarge"):
            with pytest.raises(connection.RefusedError):
                asked.call(name)
        assert asked.call("status")["drawn"] == 0


def test_a_path_that_means_something_else_elsewhere_is_not_sent(served: Served, tmp_path: Path) -> None:
    """A picture from a process substitution, say: the server has other files under those numbers."""
    picture = tmp_path / "a.png"
    assert ldm_here("txt2img", "a fox", "-m", tiny_model(), *FAST, "-o", picture).code == 0
    with picture.open("rb") as file:
        same = ("img2img", "a fox", "-m", tiny_model(), *FAST, "-i", f"/proc/self/fd/{file.fileno()}", "-o", "-")
        assert served.run(*same).out == ldm_here(*same).out
    assert served.status()["drawn"] == 0


def test_a_socket_is_where_no_other_user_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="l") as folder:  # of a path that is short enough for sockets
        check_places(Path(folder), monkeypatch)


def check_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = tmp_path / "run"
    private.mkdir(mode=0o700)
    assert socket_path({"XDG_RUNTIME_DIR": str(private)}) == private / "ldm.sock"
    user = os.geteuid()
    elsewhere = tmp_path / f"ldm-{user}" / "ldm.sock"
    (tmp_path / "link").symlink_to(private)
    private_of_all = tmp_path / "all"
    private_of_all.mkdir()
    private_of_all.chmod(0o750)
    for folder in (tmp_path / "link", private_of_all, tmp_path / "nothing", Path("run"), Path(f"/{'x' * 120}")):
        assert socket_path({"XDG_RUNTIME_DIR": str(folder), "TMPDIR": str(tmp_path)}) == elsewhere
    assert socket_path({"LDM_SERVER": str(tmp_path / "s"), "XDG_RUNTIME_DIR": str(private)}) == tmp_path / "s"
    with pytest.raises(UsageError, match="too long"):
        socket_path({"LDM_SERVER": "s" * 200})
    monkeypatch.delenv("LDM_SERVER", raising=False)
    elsewhere.parent.symlink_to(private)  # as another user may have left it
    with pytest.raises(CannotCreateError, match="only you can enter"), listening(elsewhere):
        pass
    elsewhere.parent.unlink()
    with listening(elsewhere):
        assert is_private(elsewhere.parent)
        assert is_safe(elsewhere)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            assert peer_is_user(ours)
            monkeypatch.setattr(os, "geteuid", lambda: user + 1)
            assert not peer_is_user(ours)
            assert not is_safe(elsewhere)
            assert not is_private(elsewhere.parent)
    monkeypatch.undo()
    elsewhere.parent.chmod(0o755)
    assert not is_safe(elsewhere)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_gets_no_answer() -> None:
    """Neither through the socket as it is nor through one that was opened to all; and its commands use none of ours."""
    with tempfile.TemporaryDirectory(prefix="l") as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "s.sock"
        served = Served(path)
        try:
            for mode, refused in ((0o600, PermissionError), (0o666, ConnectionError)):
                path.chmod(mode)
                with pytest.raises(refused):
                    greet_as_another(path)
            assert served.status()["clients"] == 0
        finally:
            assert "Traceback" not in served.end()


def greet_as_another(path: Path) -> None:
    """What another user's program gets for greeting."""
    with socket.socket(socket.AF_UNIX) as client:
        os.seteuid(65534)
        try:
            assert not is_safe(path)
            client.connect(str(path))
            send(client, {"hello": place.agreement(), "level": 10})
            receive(client)
        finally:
            os.seteuid(0)
