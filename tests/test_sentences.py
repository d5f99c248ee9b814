"""What the program says to its users is written in one way, wherever it is said."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldmcli import errors
from ldmcli.batch.lines import joined_hint
from ldmcli.batch.reading import open_rows
from ldmcli.conditioning.hints import argument_hints, syntax_hint
from ldmcli.errors import LdmError

ROOT = Path(errors.__file__).parent
_CLASSES = {name for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, LdmError)}
_CLASSES |= {"BadParameter", "StartError", "DeviceLostError", "CancelledError"}
# What may stand in front with a capital letter: names.
_NAMES = ("LDM_", "Ray ", "JPEG ", "PNG ", "CLIP's ", "__")
_UNWANTED = r"!|  |\b(please|invalid|illegal|unable|failed to|can't|don't|doesn't|isn't|won't|sorry|oops)\b"


def _text(node: ast.AST) -> str:
    """A sentence as it is written, {} for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return "{}"


def _calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Every call in the package: what is called, and where."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
                yield name, f"{path.relative_to(ROOT)}:{node.lineno}", node


ERRORS = {where: _text(call.args[0]) for name, where, call in _calls() if name in _CLASSES}
CURES = {where: _text(call.args[2]) for name, where, call in _calls() if name == "bad_file" and len(call.args) == 3}
REMARKS = {
    where: _text(call.args[0]).replace("%s", "{}")
    for name, where, call in _calls()
    if name == "warning" and isinstance(call.args[0], ast.Constant)
}
REMARKS |= {where: _text(call.args[1]) for name, where, call in _calls() if name == "warn_once"}


def test_there_are_sentences_to_look_at() -> None:
    assert len(ERRORS) > 300
    assert len(CURES) > 50
    assert len(REMARKS) > 30


@pytest.mark.parametrize("where", ERRORS)
def test_an_error_is_one_sentence(where: str) -> None:
    text = ERRORS[where]
    assert re.match(r"[a-z0-9{“'\[-]", text) or text.startswith(_NAMES), text
    assert text.endswith((".", "?", "{}")), text
    assert not re.search(r"[.?] [A-Z]", text), text
    assert not re.search(_UNWANTED, text, re.IGNORECASE), text
    assert not re.search(r"'\{\}'", text), f"paths stand as they are, values by repr: {text}"


@pytest.mark.parametrize("where", CURES)
def test_a_cure_has_no_stop_of_its_own(where: str) -> None:
    assert re.match(r"[a-z{-]", CURES[where])
    assert not CURES[where].endswith(".")


@pytest.mark.parametrize("where", REMARKS)
def test_a_remark_is_a_sentence_without_a_stop(where: str) -> None:
    text = REMARKS[where]
    assert re.match(r"[a-z0-9{“'%-]", text) or text.startswith(_NAMES), text
    assert not text.endswith("."), text
    assert not re.search(r"[.?)}] [A-Z]", text), text
    assert not re.search(_UNWANTED, text, re.IGNORECASE), text


def test_hints_are_remarks_too(tmp_path: Path) -> None:
    hints = [syntax_hint(prompt) for prompt in ("a {cat|dog}", "<lora:x:1>", "a (cat:1.2)", "a BREAK b")]
    hints += [*argument_hints(("a", "red", "apple"), "4"), joined_hint(3)]
    header = "prompt,batch_size,stepz\n"
    for name, text in (("a.txt", "--prompt x\na cat --n dog\n"), ("b.csv", f"{header}a,1,2\n{header}")):
        (tmp_path / name).write_text(text)
        rows = open_rows(tmp_path / name)
        assert list(rows)
        hints += rows.hints
    assert len(hints) >= 10
    assert not [hint for hint in hints if hint.endswith(".") or re.match(r"[A-Z]", hint) or "\n" in hint]
