"""Options for networks and pictures that steer."""

import click

from ldmcli.cli.command import Command
from ldmcli.cli.options import Name, option, together
from ldmcli.control import CANNY_USUAL, MODES, TYPES
from ldmcli.image_prompt import BLOCKS, NO_MASK


class DrawingCommand(Command):
    """A command on which --canny may stand alone, before whatever comes next."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        usual = f"--canny={CANNY_USUAL}"
        return super().parse_args(ctx, [usual if i < end and a == "--canny" else a for i, a in enumerate(args)])


# Networks that have the picture follow others, each option once for all of them or once for each: CONTROL_FIELDS.
_CONTROL = (
    option("--control-net", type=Name(), multiple=True, metavar="FILE",
           help="Have the picture follow another: a ControlNet, Control-LoRA or T2I-Adapter, a file, a folder or "
           "ORG/NAME of the hub; may be given again."),
    option("--control-image", type=Name(), multiple=True, metavar="FILE",
           help="What it follows: edges, depths, poses … as the network was trained to read.  [default: --image]"),
    option("--control-strength", type=Name(), multiple=True, metavar="NUMBER",
           help="How strongly; 0 is not at all.  [default: 1]"),
    option("--control-start", type=Name(), multiple=True, metavar="SHARE",
           help="The share of the steps after which it begins.  [default: 0]"),
    option("--control-end", type=Name(), multiple=True, metavar="SHARE",
           help="The share of the steps after which it ends.  [default: 1]"),
    option("--control-mode", type=Name(), multiple=True, metavar="|".join(MODES),
           help="What counts more, the prompt or the network; guess is diffusers' mode for no prompt at all.  "
           "[default: balanced]"),
    option("--control-type", type=Name(), multiple=True, metavar="TYPE",
           help=f"What a Union network is given: {', '.join(TYPES)}; inpaint for others, too, which then see nothing "
           "of what is masked."),
    option("--canny", type=Name(), multiple=True, metavar="[=LOW,HIGH]",
           help=f"Give the network the edges of the picture.  [thresholds: {CANNY_USUAL}]"),
)  # fmt: skip

# Pictures that are prompts, each option once for all of them or once for each: IP_ADAPTER_FIELDS.
_IMAGE_PROMPTS = (
    option("--ip-adapter", type=Name(), multiple=True, metavar="FILE",
           help="Have a picture be a prompt: an IP-Adapter, a file, a folder or ORG/NAME/FILE of the hub; may be given "
           "again."),
    option("--ip-adapter-image", type=Name(), multiple=True, metavar="FILE",
           help="The picture, of which the middle square is read.  [default: --image]"),
    option("--ip-adapter-strength", type=Name(), multiple=True, metavar="NUMBER",
           help="How much it counts; 0 is not at all.  [default: 1]"),
    option("--ip-adapter-mask", type=Name(), multiple=True, metavar="FILE",
           help=f"Where it counts: white; {NO_MASK} is everywhere."),
    option("--ip-adapter-blocks", type=Name(), multiple=True, metavar="|".join(BLOCKS),
           help="What of it counts: all, its style or its layout.  [default: all]"),
)  # fmt: skip


steering_options = together(*_CONTROL, *_IMAGE_PROMPTS)  # which networks and pictures steer: STEERING
