"""`ldm completion`: what has a shell complete commands, options and their values; and what it asks for each word.

A shell runs `ldm` with _LDM_COMPLETE set, at each Tab: nothing that is imported here takes long.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, FishComplete, ZshComplete, add_completion_class

from ldmcli.cli.command import command
from ldmcli.cli.configured import PROFILES, all_commands, config_path, read_settings
from ldmcli.control import EMBEDDED_CONTROL, TYPES
from ldmcli.errors import LdmError

_MAX_NAMES = 2000  # of files that are offered by name
_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".bin", ".pth")
_INDEX, _RUN = "model_index.json", "run.json"
_FILES, _FOLDERS = ("FILE", "PATH", "PNG", "IMAGE"), ("DIR",)  # what a metavar begins with
_Item = CompletionItem[str]

# Each gets lines of a kind and a value, of which zsh wants the parts in lines of their own.
_BASH = """\
_ldm_completion() {
    local IFS=$'\\n' type value ldm=${1/#\\~/$HOME}
    COMPREPLY=()
    while IFS=, read -r type value; do
        case $type in
            file) compopt -o filenames; COMPREPLY+=($(compgen -f -- "$value")) ;;
            dir) compopt -o filenames; COMPREPLY+=($(compgen -d -- "$value")) ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done < <(COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD _LDM_COMPLETE=bash_complete "$ldm" 2>/dev/null)
}
complete -o nosort -F _ldm_completion ldm
"""
_ZSH = """\
#compdef ldm
_ldm_completion() {
    local -a plain described answer
    local type value help files folders asked=$((CURRENT-1))
    answer=("${(@f)$(COMP_WORDS="${words[*]}" COMP_CWORD=$asked _LDM_COMPLETE=zsh_complete ${~words[1]} 2>/dev/null)}")
    [[ $words[CURRENT] == --*=* ]] && compset -P 1 '*='
    for type value help in "${answer[@]}"; do
        case $type in
            file) files=1 ;;
            dir) folders=1 ;;
            plain) if [[ $help == _ ]]; then plain+=("$value"); else described+=("$value:$help"); fi ;;
        esac
    done
    (( $#described )) && _describe -V ldm described
    (( $#plain )) && compadd -V ldm -a plain
    [[ -n $files ]] && _files
    [[ -n $folders ]] && _files -/
    return 0
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _ldm_completion "$@"; else compdef _ldm_completion ldm; fi
"""
_FISH = """\
function __ldm_completion
    set -l token (commandline -ct)
    set -l words (commandline -cp | string collect)
    set -l before (string match -r -- '^--[^=]*=' $token)
    for line in (COMP_WORDS=$words COMP_CWORD="$token" _LDM_COMPLETE=fish_complete ldm 2>/dev/null)
        set -l part (string split -m 1 , -- $line)
        switch $part[1]
            case file
                string replace -r '^' -- "$before" (__fish_complete_path "$part[2]")
            case dir
                string replace -r '^' -- "$before" (__fish_complete_directories "$part[2]" '')
            case plain
                echo -- "$before$part[2]"
        end
    end
end
complete -c ldm -f -a '(__ldm_completion)'
"""


@command(short_help="Print a script that has a shell complete words.")
@click.argument("shell", metavar="bash|zsh|fish", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that has your shell complete commands, options, files, models, samplers and LoRAs.

    \b
    echo 'eval "$(ldm completion bash)"' >> ~/.bashrc
    echo 'eval "$(ldm completion zsh)"' >> ~/.zshrc        # behind compinit
    ldm completion fish > ~/.config/fish/completions/ldm.fish
    """
    click.echo({"bash": _BASH, "zsh": _ZSH, "fish": _FISH}[shell], nl=False)


def values(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[_Item]:
    """What may stand for `parameter`, which has begun as `incomplete`. Its metavar says of what kind that is: words
    that may be typed as they stand, files, folders, models, and so on."""
    if isinstance(parameter.type, click.Choice):
        return parameter.type.shell_complete(context, parameter, incomplete)
    metavar = parameter.metavar or ""
    kinds = metavar.strip("[]").split("|")
    found = [kind for kind in kinds if kind.islower() and ":" not in kind]
    found += _named(context, parameter.name or "", kinds[-1])
    items = [_Item(one) for one in dict.fromkeys(found) if one.startswith(incomplete)]
    if parameter.name in ("status", "watch") or (parameter.name == "folder" and context.command.name == "gallery"):
        return [_Item(one) for one in _runs(incomplete)] or [_Item(incomplete, type="dir")]
    if any(kind.startswith((*_FILES, "MODEL", "LORA")) for kind in kinds):
        items.append(_Item(incomplete, type="file"))
    elif any(kind.startswith(_FOLDERS) for kind in kinds):
        items.append(_Item(incomplete, type="dir"))
    return items


def _named(context: click.Context, name: str, kind: str) -> list[str]:
    """What has a name to type, of a parameter's kind."""
    if kind.startswith(("MODEL", "ORG/NAME")):
        return list(_models())
    if kind.startswith("LORA"):
        folder = _setting(context, "lora_dir")
        return [path.stem for path in _under(folder) if path.suffix in _WEIGHTS] if folder else []
    if kind == "COMMAND":
        return [one.name or "" for one in all_commands()]
    if name == "profile":
        return _profiles()
    return {"control_type": list(TYPES), "control_net": [EMBEDDED_CONTROL]}.get(name, [])


def _models() -> Iterator[str]:
    """What --model may name beside paths: in $LDM_MODELS, and in the hub's cache; nothing is opened."""
    own = os.environ.get("LDM_MODELS")
    for path in _entries(own) if own else ():
        if path.suffix == _WEIGHTS[0]:
            yield path.stem
        elif (path / _INDEX).is_file():
            yield path.name
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    for path in _entries(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")):
        kind, *names = path.name.split("--")
        if kind == "models" and len(names) == 2:
            yield "/".join(names)


def _runs(incomplete: str) -> list[str]:
    """The folders with a run of `ldm batch` that begin so."""
    parent, begun = os.path.split(incomplete)
    found = (path for path in _entries(parent or ".") if path.name.startswith(begun))
    return [os.path.join(parent, path.name) for path in found if (path / _RUN).is_file()]


def _profiles() -> list[str]:
    import tomllib

    path = config_path()
    try:
        found = tomllib.loads(path.read_text("utf-8-sig")).get(PROFILES) if path else None
    except (OSError, ValueError):
        return []
    return list(found) if isinstance(found, dict) else []


def _setting(context: click.Context, name: str) -> Any:
    """What an option is set to: here, in the environment, or in the configuration file."""
    given = context.params.get(name)
    path = config_path()
    if given is None and path is not None:
        try:
            found: Mapping[str, Any] = read_settings(context.command, path, None)
        except LdmError:
            return None
        return found[name].value if name in found else None
    return given


def _entries(folder: str) -> Iterable[Path]:
    """What is in a folder; nothing where it cannot be read."""
    try:
        with os.scandir(os.path.expanduser(folder)) as entries:
            return sorted(Path(one.path) for one in itertools.islice(entries, _MAX_NAMES))
    except OSError:
        return ()


def _under(folder: str) -> list[Path]:
    """The files in a folder and in those inside."""
    walk = os.walk(os.path.expanduser(folder))
    return list(itertools.islice((Path(path, name) for path, _, names in walk for name in names), _MAX_NAMES))


class _Bash(BashComplete):
    def get_completion_args(self) -> tuple[list[str], str]:
        """click's, less the = that bash makes a word of in --option=value."""
        args, incomplete = super().get_completion_args()
        return [one for before, one in zip(["", *args], args, strict=False) if not _joins(before, one)], incomplete


def _joins(before: str, word: str) -> bool:
    return word == "=" and before.startswith("--")


for _shell in (_Bash, ZshComplete, FishComplete):
    add_completion_class(_shell)
