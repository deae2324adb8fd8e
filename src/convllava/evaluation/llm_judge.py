"""Another model as the judge of free answers, at an address that speaks OpenAI's chat protocol."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from convllava.errors import InputError
from convllava.io import one_line

KEY_VARIABLE = "CONVLLAVA_JUDGE_KEY"
ATTEMPTS = 3
TIMEOUT = 60.0
INSTRUCTION = """\
You grade an answer to a question about an image that you do not see. Compare the answer with the ground truth and \
give a score of 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9 or 1.0: how much of the ground truth it gets right.
Parts of the ground truth joined by <AND> are all needed for 1.0; of parts joined by <OR> any one is enough.

Question: What numbers solve the equation?
Ground truth: 2 <AND> -7
Answer: x = 4
Score: 0.0

Question: What numbers solve the equation?
Ground truth: 2 <AND> -7
Answer: x = 2
Score: 0.5

Question: What numbers solve the equation?
Ground truth: 2 <AND> -7
Answer: 2 and minus seven
Score: 1.0

Question: What is the man holding?
Ground truth: cell phone <OR> mobile phone
Answer: He holds a mobile phone.
Score: 1.0

Reply with the score alone.
"""
"""In MM-Vet's scheme (arXiv 2308.02490, table 1: few examples, scores in steps of 0.1), in our own, fewer words."""


class ChatJudge:
    """Scores an answer by asking a model; the same question, truth and answer get the same request.

    Args:
        url: Up to and without /chat/completions, such as http://localhost:8000/v1.
        model: As the server calls it.
        pause: Seconds before the second attempt; twice as many before the third.

    The environment variable CONVLLAVA_JUDGE_KEY, if set, is sent as the bearer token.
    """

    def __init__(self, url: str, model: str, pause: float = 2.0) -> None:
        if not re.match(r"https?://", url):
            raise InputError(f"--judge-url {url}: give an http address such as http://localhost:8000/v1")
        self.address, self.model, self.pause = f"{url.rstrip('/')}/chat/completions", model, pause

    def __call__(self, question: str, truth: str, answer: str) -> float | None:
        """The score, 0 to 1; None where the reply holds none.

        Raises:
            InputError: the address does not answer as such a server does, after three attempts.
        """
        task = f"Question: {question}\nGround truth: {truth}\nAnswer: {answer}\nScore:"
        reply = self._ask(f"{INSTRUCTION}\n{task}")
        return score_in(reply)

    def _ask(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 16,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.address, json.dumps(body).encode(), headers)
        content = _patiently(lambda: _content_of(request), self.pause, self.address)
        return str(content)


def _content_of(request: urllib.request.Request) -> Any:
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        return json.loads(response.read())["choices"][0]["message"]["content"]


def _patiently(work: Callable[[], Any], pause: float, address: str) -> Any:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work()
        except (OSError, ValueError, LookupError, TypeError) as error:
            if attempt == ATTEMPTS:
                raise InputError(f"the judge at {address} does not answer as expected: {one_line(error)}") from None
            time.sleep(pause * attempt)
    raise AssertionError("unreachable")


def score_in(reply: str) -> float | None:
    """The one number from 0 to 1 that a judge's reply begins with; None where it does not."""
    found = re.match(r"\s*(?:Score:)?\s*(\d+(?:\.\d+)?|\.\d+)(?![\d/%])", reply)
    score = float(found[1]) if found else -1.0
    return score if 0 <= score <= 1 else None
