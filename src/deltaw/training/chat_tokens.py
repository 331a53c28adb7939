"""A conversation as tokens, and which of them the loss counts: the answers, up to the token that ends each.

The chat template renders the whole conversation once; where an answer begins and ends in the text is found by rendering
the messages before it (with the invitation to answer) and up to it. No token is guessed: one that only touches an
answer's text belongs to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltaw.errors import DataError
from deltaw.training.conversations import Conversation, Unusable

IGNORED = -100
"""Label of a token that the loss does not count; cross entropy's own convention."""
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}Assistant: {{ m['content'] }}{{ eos_token }}\n"
    "{% else %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The template for a model that brings none."""


@dataclass(frozen=True)
class Tokens:
    """ids and labels, equally long: the label is the id itself, or IGNORED."""

    ids: list[int]
    labels: list[int]

    @property
    def counted(self) -> int:
        """Labels that the loss counts: the first token is predicted by nothing."""
        return sum(label != IGNORED for label in self.labels[1:])


def render(tokenizer: Any, messages: Sequence[Any], *, invite: bool = False) -> str:
    """The text that the model reads. invite: end with the beginning of an answer."""
    template = None if tokenizer.chat_template else PLAIN
    text: str = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=invite, chat_template=template
    )
    return text


def answer_spans(tokenizer: Any, messages: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and (start, end) of each answer in it, its end mark included.

    Raises:
        Unusable: the template refuses the conversation.
        DataError: the template rewrites earlier messages, so that an answer's place cannot be told.
    """
    try:
        whole = render(tokenizer, messages)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = render(tokenizer, messages[:i], invite=True)
                upto = render(tokenizer, messages[: i + 1])
                if not (upto.startswith(before) and whole.startswith(upto.rstrip())):
                    raise DataError(
                        "the chat template rewrites earlier messages when later ones come: the answers cannot be told apart; "
                        "use conversations of one answer each"
                    )
                spans.append((len(before), len(upto.rstrip())))
    except DataError:
        raise
    except Exception as error:  # a template raises what it likes: roles that do not alternate, a system message ...
        raise Unusable(f"refused by the chat template ({str(error).splitlines()[0][:80]})") from error
    return whole, spans


def tokens(tokenizer: Any, messages: Conversation, max_length: int) -> Tokens:
    """One conversation, cut to `max_length` tokens.

    Raises:
        Unusable: no token of an answer is left for the loss.
    """
    text, spans = answer_spans(tokenizer, messages)
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids = encoded["input_ids"]
    labels = [
        token if any(start < b and a < end for a, b in spans) and end > start else IGNORED
        for token, (start, end) in zip(ids, encoded["offset_mapping"])
    ]
    found = Tokens(list(ids[:max_length]), labels[:max_length])
    if found.counted == 0:
        raise Unusable(f"whose answer begins beyond max_length={max_length}")
    return found
