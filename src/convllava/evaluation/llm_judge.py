"""An LLM judge: another model grades free answers, through a server with OpenAI's chat protocol."""

import os
import re

from convllava.errors import ConfigError, InputError
from convllava.io import one_line

KEY_VARIABLE = "CONVLLAVA_JUDGE_KEY"
RETRIES = 2
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
"""MM-Vet's scheme (arXiv 2308.02490, table 1: a few examples, scores in steps of 0.1) in our own, fewer words."""


class ChatJudge:
    """Grades an answer by asking a model; the same question, truth and answer give the same request.

    The client waits and retries if the server is busy or cannot be reached. The environment variable
    CONVLLAVA_JUDGE_KEY, if set, is sent as the bearer token.

    Args:
        judge_url: The server's address, without /chat/completions, such as http://localhost:8000/v1.
        judge_model: The model's name on the server.

    Raises:
        ConfigError: if the address is not an http address, or the openai package is missing.
    """

    def __init__(self, judge_url: str, judge_model: str) -> None:
        if not re.match(r"https?://", judge_url):
            raise ConfigError(f"`judge_url` {judge_url}: give an http address such as http://localhost:8000/v1")
        try:
            import openai
        except ImportError:
            raise ConfigError("an LLM judge needs the openai package; pip install 'convllava[eval]'") from None
        self.url, self.model = judge_url, judge_model
        key = os.environ.get(KEY_VARIABLE, "none")
        self._client = openai.OpenAI(base_url=judge_url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT)

    def __call__(self, question: str, truth: str, answer: str) -> float | None:
        """Return the score, 0 to 1, or None if the reply has none.

        Raises:
            InputError: if the server does not answer with a chat completion, after the retries.
        """
        import openai

        task = f"Question: {question}\nGround truth: {truth}\nAnswer: {answer}\nScore:"
        try:
            completion = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": f"{INSTRUCTION}\n{task}"}],
                temperature=0,
                max_tokens=16,
            )
            return parse_score(str(completion.choices[0].message.content))
        except (openai.OpenAIError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"the LLM judge at {self.url} does not answer as expected: {one_line(error)}") from None


def parse_score(reply: str) -> float | None:
    """Return the number from 0 to 1 with which a judge's reply begins, or None."""
    found = re.match(r"\s*(?:Score:)?\s*(\d+(?:\.\d+)?|\.\d+)(?![\d/%])", reply)
    score = float(found[1]) if found else -1.0
    return score if 0 <= score <= 1 else None
