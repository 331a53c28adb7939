"""Text classification with any encoder of transformers: `AutoModelForSequenceClassification` over labelled sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltaw.errors import DataError, MissingExtra
from deltaw.training.config import RunConfig
from deltaw.training.hub import check_length, load_pretrained, position_rows, quiet_transformers, resolve
from deltaw.training.labelled import all_rows, labelled_text, short
from deltaw.training.task import Batch, Classified, Task, answer


class TextClassification(Task):
    """Sentences and their classes.

    label_names: what the source's labels are called, where the source only numbers them.
    labels: the class names, in order, of a kept run. read: whether the data are wanted as well; "whole" takes what
        `to_score` does, as one split.
    """

    metric = "accuracy"

    def __init__(
        self,
        config: RunConfig,
        label_names: Mapping[str, str] | None = None,
        labels: Sequence[str] | None = None,
        read: Literal["splits", "whole", "no"] = "splits",
    ) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise MissingExtra("text classification needs transformers: pip install 'deltaw[train]'") from error
        self.config = config
        self.notes = []
        if config.model is None:
            raise DataError(
                "no model: set model=FOLDER or a hub id, for example model=sentence-transformers/all-MiniLM-L6-v2"
            )
        self.model_name = config.model
        self.folder, where = resolve(config.model, config.revision)
        self.notes.append(f"model: {where}")
        self.tokenizer = load_pretrained(AutoTokenizer, self.folder, config.model, revision=config.revision)
        self.splits = {}
        self.labels = list(labels or ())
        if read == "whole":
            name, rows, notes = all_rows(config.data, self.labels, label_names)
            self.notes += notes
            self.splits = {name: self._tokens(rows)}
        elif read == "splits":
            data, source = labelled_text(config.data, config.seed, label_names)
            if labels is not None and data.labels != self.labels:
                raise DataError(f"the data have the classes {data.labels}, the kept result knows {self.labels}")
            self.labels = data.labels
            self.notes += [f"data: {source}", *data.notes()]
            self.splits = {name: self._tokens(rows) for name, rows in data.splits.items()}
        self._new: list[str] = []

    def _tokens(self, rows: Sequence[tuple[str, int]]) -> list[tuple[list[int], int]]:
        encoded = self.tokenizer([text for text, _ in rows], truncation=True, max_length=self.config.max_length)[
            "input_ids"
        ]
        return [(ids, label) for ids, (_, label) in zip(encoded, rows)]

    def build(self) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        drop = self.config.base_dropout
        extra: dict[str, Any] = {} if drop is None else {"base_dropout": drop}
        torch.manual_seed(self.config.seed)  # the new classifier starts the same every time
        model, missing = load_pretrained(
            AutoModelForSequenceClassification,
            self.folder,
            self.model_name,
            revision=self.config.revision,
            num_labels=len(self.labels),
            id2label=dict(enumerate(self.labels)),
            label2id={label: i for i, label in enumerate(self.labels)},
            with_missing=True,
            **extra,
        )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.pad
        self.check_fits(model)
        self._new = list(dict.fromkeys(key.rpartition(".")[0] for key in missing))
        self.model_type = model.config.model_type
        return model  # type: ignore[no-any-return]

    @property
    def pad(self) -> int:
        """The token id that fills up short rows."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id or 0)

    def new_modules(self, model: nn.Module) -> list[str]:
        """What the checkpoint lacks; if it lacks nothing (a classifier already), what lies outside the body."""
        if self._new:
            return self._new
        body = getattr(model, "base_model_prefix", "")
        return [
            name for name, module in model.named_children() if name != body and any(True for _ in module.parameters())
        ]

    def check_fits(self, model: nn.Module) -> None:
        self._check_lengths(model, [row for rows in self.splits.values() for row in rows])

    def _check_lengths(self, model: nn.Module, rows: Sequence[tuple[list[int], int]]) -> None:
        longest = max((len(ids) for ids, _ in rows), default=0)
        check_length(longest, self.config.max_length, self.model_name, position_rows(model))

    def drawn_modules(self) -> list[str]:
        return self._new

    def prefix(self, model: nn.Module) -> str | None:
        name = getattr(model, "base_model_prefix", "")
        return name if name and hasattr(model, name) else None

    def keep_model(self, model: nn.Module, folder: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(folder)  # type: ignore[operator]
        self.tokenizer.save_pretrained(folder)

    # ---- examples

    def lengths(self, split: str) -> Sequence[int] | None:
        return [len(ids) for ids, _ in self.splits[split]]

    def collate(self, examples: Sequence[tuple[list[int], int]]) -> Batch:
        lengths = torch.tensor([len(ids) for ids, _ in examples])
        width = int(lengths.max())
        ids = torch.full((len(examples), width), self.pad)  # (batch, width)
        for row, (tokens, _) in zip(ids, examples):
            row[: len(tokens)] = torch.tensor(tokens)
        mask = (torch.arange(width) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([label for _, label in examples])}

    def render(self, example: tuple[list[int], int]) -> str:
        ids, label = example
        return f"{short(self.labels[label])}  <-  {self.tokenizer.decode(ids)}"

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return nn.functional.cross_entropy(logits.float(), batch["labels"], reduction="sum"), logits

    def tally(self) -> Classified:
        return Classified(len(self.labels))

    # ---- afterwards

    def facts(self) -> dict[str, Any]:
        return {"task": "text-classification", "labels": self.labels, "max_length": self.config.max_length}

    @torch.no_grad()
    def predict(self, model: nn.Module, inputs: Sequence[str]) -> list[dict[str, Any]]:
        """For each text: the label, and the probability of every class."""
        model.eval()
        found: list[Tensor] = []
        for start in range(0, len(inputs), self.config.eval_batch_size):
            rows = self._tokens([(text, 0) for text in inputs[start : start + self.config.eval_batch_size]])
            self._check_lengths(model, rows)
            _, logits = self.loss(model, self.collate(rows))
            found += logits.float().softmax(-1)
        return [answer(text, self.labels, shares) for text, shares in zip(inputs, found)]
