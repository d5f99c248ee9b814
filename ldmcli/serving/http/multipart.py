"""The parts of a multipart/form-data body (RFC 7578), which is in memory already."""

from email.message import Message

from ldmcli.serving.http.limits import Refused

_MAX_PARTS = 64
_MAX_HEAD = 4096  # bytes


def read_form(body: bytes, content_type: str) -> tuple[dict[str, str], dict[str, list[bytes]]]:
    """The text fields by name, and the files. Raises Refused."""
    boundary = _parameters(content_type, "content-type").get_param("boundary")
    if not isinstance(boundary, str) or not 1 <= len(boundary) <= 70 or not boundary.isascii():
        raise Refused("the form has no boundary.")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode(), _MAX_PARTS + 2)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--") or len(pieces) > _MAX_PARTS + 2:
        raise Refused(f"the form is cut off, or has more than {_MAX_PARTS} fields.")
    fields: dict[str, str] = {}
    files: dict[str, list[bytes]] = {}
    for piece in pieces[1:-1]:
        head, blank, content = piece.partition(b"\r\n\r\n")
        if not blank or len(head) > _MAX_HEAD:
            raise Refused("a field of the form has no head, or too long a one.")
        name, is_file = _named(head)
        if is_file:
            files.setdefault(name, []).append(content)
        elif name in fields:
            raise Refused(f"the form gives {name} twice.", field=name)
        else:
            try:
                fields[name] = content.decode()
            except UnicodeDecodeError:
                raise Refused(f"{name} is not UTF-8 text.", field=name) from None
    return fields, files


def _named(head: bytes) -> tuple[str, bool]:
    """What a part is called, and whether it is a file; the name it has on the client's disk is of no interest."""
    for line in head.decode("utf-8", "replace").split("\r\n"):
        title, _, value = line.partition(":")
        if title.strip().lower() == "content-disposition":
            found = _parameters(value.strip(), "content-disposition")
            name = found.get_param("name", header="content-disposition")
            if isinstance(name, str) and name.isprintable() and 1 <= len(name) <= 100:
                return name, found.get_param("filename", header="content-disposition") is not None
    raise Refused("a field of the form has no name.")


def _parameters(value: str, header: str) -> Message:
    message = Message()
    message[header] = value.replace("\r", " ").replace("\n", " ")
    return message
