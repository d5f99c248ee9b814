"""`ldm pull`: a model of the hub, fetched ahead of its use."""

import logging
import os
from pathlib import Path

import click

from ldmcli.cli.command import command, values
from ldmcli.cli.options import option, verbosity_options
from ldmcli.errors import UsageError, printable

_log = logging.getLogger(__name__)


@command(short_help="Fetch a model from the Hugging Face hub.")
@click.argument("model", metavar="ORG/NAME[@REVISION]", shell_complete=values)
@option("--fp16/--full", default=True, show_default=True,
        help="Which weights to fetch where the model has both: in 16 bits, or in full.")  # fmt: skip
@verbosity_options
def pull(model: str, fp16: bool) -> None:
    """Fetch a model from the Hugging Face hub, and print the folder it is in.

    Only what is needed to draw is fetched, and of models only safetensors. It goes to the cache that all tools of the
    hub share. Interrupted downloads resume. ORG/NAME/FILE.safetensors fetches one file.

    \b
    Examples:
    ldm pull stable-diffusion-v1-5/stable-diffusion-v1-5
    ldm txt2img -m stable-diffusion-v1-5/stable-diffusion-v1-5 "a lighthouse at dawn"

    HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are honoured.
    """
    from ldmcli.hub.fetch import fetch, parse

    wanted = parse(model)
    if wanted is None:
        raise UsageError(
            f"{printable(repr(model))} is no name of a model on the hub; they are ORG/NAME, as on its pages."
        )
    path = fetch(wanted, half=fp16)
    _log.info("%s: %s", wanted, _kind(path))
    if os.path.lexists(model):
        _log.warning("--model %s means what has that name in this folder; for the hub's, name %s", model, path)
    click.echo(os.fsencode(path))


def _kind(path: Path) -> str:
    """What was fetched. Raises BadDataError where it is a model, but none that can be run."""
    from ldmcli.checkpoints.inspection import inspect
    from ldmcli.checkpoints.layout import INDEX, LEARNED

    if path.is_dir() and not (path / INDEX).is_file():
        is_embedding = any((path / name).is_file() for name in LEARNED)
        return "an embedding, to name after --embedding" if is_embedding else "a part of a model, to name after --vae"
    return str(inspect(path)["is"])
