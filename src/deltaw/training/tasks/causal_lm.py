"""Fine-tuning of a causal language model on conversations; the loss counts the answers' tokens only."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltaw.errors import DataError, MissingExtra
from deltaw.training.chat_tokens import IGNORED, Tokens, answer_spans, render, tokens
from deltaw.training.config import RunConfig
from deltaw.training.conversations import Conversation, Unusable, conversations, conversations_to_score
from deltaw.training.hub import check_length, quiet_transformers
from deltaw.training.labelled import DROPPED
from deltaw.training.language_models import language_model, tokenizer_of
from deltaw.training.packing import collate, may_see, pack
from deltaw.training.scoring import evaluate
from deltaw.training.task import Batch, Tally, Task


class Predicted(Tally):
    """Perplexity, and the share of tokens that were the most likely one. Outputs are (2, tokens): loss, hit or not."""

    def __init__(self) -> None:
        self.loss = self.hits = 0.0
        self.count = 0

    def add(self, outputs: Tensor, batch: Batch) -> None:
        self.loss += float(outputs[0].double().sum())
        self.hits += float(outputs[1].double().sum())
        self.count += outputs.shape[1]

    def scores(self) -> dict[str, float]:
        mean = self.loss / max(self.count, 1)
        perplexity = math.exp(mean) if mean < 700 else math.inf  # beyond, a float overflows
        return {"perplexity": perplexity, "token_accuracy": self.hits / max(self.count, 1)}


class CausalLM(Task):
    """Conversations and the model that is to answer like them.

    packing: several conversations in a row of `max_length` tokens; else one to a row, batches by length.
    before: score the untouched base on the validation part first, for the log.
    read: "whole" takes what `to_score` does, as one split; "no" builds the task without data, to talk.
    """

    metric = "perplexity"
    higher_is_better = False

    def __init__(
        self,
        config: RunConfig,
        *,
        packing: bool = True,
        before: bool = True,
        read: Literal["splits", "whole", "no"] = "splits",
    ) -> None:
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise MissingExtra("language models need transformers: pip install 'deltaw[train]'") from error
        if config.model is None:
            raise DataError("no model: set model=FOLDER, model=FILE.gguf or a hub id")
        self.config, self.packing = config, packing
        self.model_name = config.model
        self.tokenizer, where = tokenizer_of(config.model, config.revision)
        self.notes: list[str] = [f"model: {where}"]
        if not self.tokenizer.chat_template:
            self.notes.append("the tokenizer has no chat template: 'User: ...' and 'Assistant: ...' lines are used")
        self.splits: dict[str, list[list[Tokens]]] = {}
        self._base: nn.Module | None = None
        if read != "no":
            self._read(whole=read == "whole")
        if before and read == "splits":
            self._score_base()

    # ---- data

    def _read(self, *, whole: bool) -> None:
        data = self.config.data
        found = conversations_to_score(data) if whole else conversations(data, self.config.seed)
        self.notes.append(f"data: {found.where}")
        dropped: Counter[str] = Counter(found.dropped)
        for name, talks in found.splits.items():
            usable = self._tokens(talks, dropped)
            if not usable:
                reasons = ", ".join(f"{n:,} {why}" for why, n in dropped.items())
                raise DataError(f"{found.where}: no usable conversation in {name}; dropped: {reasons}")
            rows = self._rows(usable)
            self.splits[name] = rows
            held = sum(len(t.ids) for t in usable)
            room = len(rows) * max(sum(len(t.ids) for t in row) for row in rows)
            counted = sum(t.counted for t in usable)
            self.notes.append(
                f"{name}: {len(usable):,} conversations, {held:,} tokens, {counted:,} of them counted by the loss"
                + (f", packed into {len(rows):,} rows ({held / room:.0%} full)" if self.packing else "")
            )
        if dropped:
            self.notes.append(DROPPED + ", ".join(f"{n:,} {why}" for why, n in dropped.items()))
        self.notes.append(f"first example, [[counted by the loss]]: {self.shown(next(iter(found.splits.values()))[0])}")

    def _tokens(self, talks: Sequence[Conversation], dropped: Counter[str]) -> list[Tokens]:
        usable = []
        for talk in talks:
            try:
                usable.append(tokens(self.tokenizer, talk, self.config.max_length))
            except Unusable as reason:
                dropped[str(reason)] += 1
        return usable

    def _rows(self, usable: Sequence[Tokens]) -> list[list[Tokens]]:
        if not self.packing:
            return [[one] for one in usable]
        return [[usable[i] for i in row] for row in pack([len(t.ids) for t in usable], self.config.max_length)]

    def render(self, example: list[Tokens]) -> str:
        """The first conversation of a row as the model reads it, token by token, counted ones in double brackets."""
        first, more = example[0], len(example) - 1
        text = ""
        for counted, run in groupby(zip(first.ids, first.labels), key=lambda pair: pair[1] != IGNORED):
            part = self.tokenizer.decode([token for token, _ in run])
            text += f"[[{part}]]" if counted else part
        text = " ".join(text.split())
        room = f"{len(text) - 600:,} more signs" if len(text) > 600 else ""
        packed = f"{more} more conversation{'s' if more > 1 else ''} in this row" if more else ""
        tail = "; ".join(note for note in (room, packed) if note)
        return text[:600] + (f" ... ({tail})" if tail else "")

    def shown(self, talk: Conversation) -> str:
        """A conversation as the model reads it, what the loss counts in double brackets."""
        text, spans = answer_spans(self.tokenizer, talk)
        for start, end in reversed(spans):
            text = f"{text[:start]}[[{text[start:end]}]]{text[end:]}"
        return " ".join(text.split())[:600]

    def _score_base(self) -> None:
        """Loss and perplexity of the base as it is. The model is kept for the first `build`."""
        model = self._load().eval()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        scores = evaluate(model.to(device), self, self.config, "validation")
        self._base = model.to("cpu")
        self.before = scores
        self.notes.append(
            f"before training: validation loss {scores['loss']:.4f}  perplexity {scores['perplexity']:.2f}  "
            f"token accuracy {scores['token_accuracy']:.4f}"
        )

    # ---- the model

    def _load(self) -> nn.Module:
        model: Any = language_model(self.model_name, self.config.revision, base_dropout=self.config.base_dropout)
        self.check_fits(model)
        return model  # type: ignore[no-any-return]

    def check_fits(self, model: nn.Module) -> None:
        longest = max((len(t.ids) for rows in self.splits.values() for row in rows for t in row), default=0)
        room = getattr(model.config, "max_position_embeddings", None)
        check_length(longest, self.config.max_length, self.model_name, room)  # type: ignore[arg-type]

    def build(self) -> nn.Module:
        model, self._base = self._base, None
        return self._load() if model is None else model

    def new_modules(self, model: nn.Module) -> list[str]:
        return []

    def keep_model(self, model: nn.Module, folder: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(folder)  # type: ignore[operator]
        self.tokenizer.save_pretrained(folder)

    # ---- examples

    def lengths(self, split: str) -> Sequence[int] | None:
        return None if self.packing else self.widths(split)

    def widths(self, split: str) -> Sequence[int]:
        return [sum(len(t.ids) for t in row) for row in self.splits[split]]

    def collate(self, examples: Sequence[list[Tokens]]) -> Batch:
        return dict(collate(examples, int(self.tokenizer.pad_token_id)))

    def weight(self, batch: Batch) -> float:
        return float((batch["labels"][:, 1:] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, wanted = answers(model, batch, packed=self.packing)
        losses = nn.functional.cross_entropy(logits.float(), wanted, reduction="none")  # (counted tokens,)
        hits = (logits.argmax(-1) == wanted).float()
        return losses.sum(), torch.stack([losses.detach(), hits])

    def tally(self) -> Predicted:
        return Predicted()

    # ---- afterwards

    def facts(self) -> dict[str, Any]:
        found = {"task": "causal-lm", "max_length": self.config.max_length}
        return {**found, "before": self.before} if hasattr(self, "before") else found

    @torch.no_grad()
    def answer(
        self, model: nn.Module, talk: Conversation, *, max_new: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> str:
        """The model's next message. temperature 0: the most likely token each time; else drawn, with `seed`."""
        model.eval()
        device = next(model.parameters()).device
        text = render(self.tokenizer, talk, invite=True)
        given = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).to(device)
        drawn: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            torch.manual_seed(seed)
            drawn["temperature"] = temperature
        with quiet_transformers():
            made = model.generate(  # type: ignore[operator]
                input_ids=given["input_ids"],
                attention_mask=given["attention_mask"],
                max_new_tokens=max_new,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                **drawn,
            )
        return str(self.tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    def predict(self, model: nn.Module, inputs: Sequence[str]) -> list[dict[str, Any]]:
        """For each text: the answer to it as a first question."""
        return [{"text": t, "answer": self.answer(model, [{"role": "user", "content": t}])} for t in inputs]


def answers(model: nn.Module, batch: Batch, *, packed: bool) -> tuple[Tensor, Tensor]:
    """Logits (counted, vocabulary) at the positions whose next token the loss counts, and these tokens (counted,).

    Columns that no row counts are left out before the output layer, where the model allows that.
    """
    wanted = batch["labels"][:, 1:]  # (batch, width - 1): what each position is to predict
    columns = (wanted != IGNORED).any(0).nonzero()[:, 0]
    inputs = {"input_ids": batch["input_ids"]}
    if packed:
        mask = may_see(batch["segments"])
        inputs |= {"position_ids": batch["position_ids"], "attention_mask": _as_mask(mask, model)}
    else:
        inputs["attention_mask"] = (batch["segments"] > 0).long()
    bare = getattr(model, "module", model)
    if "logits_to_keep" in inspect.signature(bare.forward).parameters:
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, columns]
    wanted = wanted[:, columns]
    counted = wanted != IGNORED
    return logits[counted], wanted[counted]


def _as_mask(allowed: Tensor, model: nn.Module) -> Tensor:
    """As booleans for PyTorch's fused attention; as 0 and the lowest number, to be added, for the plain one.

    Raises:
        DataError: the model's attention takes neither.
    """
    config: Any = getattr(getattr(model, "module", model), "config", None)
    kind = getattr(config, "_attn_implementation", "eager")
    if kind == "sdpa":
        return allowed
    if kind == "eager":
        dtype = next(model.parameters()).dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )
    raise DataError(f"packing needs attention that takes a mask, not {kind!r}: set sft.packing=false")
