"""The contender's side of the pipes: questions come as lines of JSON on stdin, answers go as lines to stdout."""

import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ldmcli.errors import LdmError

Answers = Mapping[str, Callable[..., dict[str, Any]]]


def serve(prepare: Callable[[], Answers]) -> None:
    """Answer until stdin ends. `prepare` loads what is needed and gives a function for each question.

    An LdmError is answered as a refusal; any other ends the process, and its traceback's last line is what the bench
    tells. Where stdin ends in the middle of a computation, the bench has gone: so does this process, at once.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    questions: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(questions,), daemon=True).start()
    answers: Answers | None = None
    while True:
        fields = json.loads(questions.get())
        question = fields.pop("ask")
        try:
            if answers is None:
                answers = prepare()
            answer = answers[question](**fields)
        except LdmError as error:
            answer = {"refused": str(error), "code": error.exit_code}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def _listen(questions: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        questions.put(line)
    os._exit(0)
