"""BLEU, METEOR, ROUGE-L, CIDEr and SPICE as COCO's caption evaluation computes them, by pycocoevalcap.

This module calls the scorers one by one. `COCOEvalCap.evaluate` would build SPICE first, which downloads its jars if
they are missing, and would return no score if that fails. A metric that cannot be computed is None, with the reason.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import BadValue, need


METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")

Captions = dict[int, list[str]]


class CaptionScores(NamedTuple):
    """Every metric as a fraction, as its authors define it (CIDEr may exceed 1), or None with a reason."""

    values: dict[str, float | None]
    reasons: dict[str, str]


class Scorer(NamedTuple):
    """A scorer of some metrics. `score` takes tokenised references and predictions, and returns one number per metric.

    `lacks` says what is missing on this machine.
    """

    metrics: tuple[str, ...]
    score: Callable[[Captions, Captions], Sequence[float]]
    lacks: str | None = None


def score_captions(references: Mapping[int, Sequence[str]], predictions: Mapping[int, str]) -> CaptionScores:
    """Score one prediction per image against the references of that image.

    Raises ValueError for a prediction without references, and ImportError without pycocoevalcap.
    """
    lacking = unavailable()
    unknown = [image_id for image_id in predictions if not references.get(image_id)]
    if unknown:
        raise BadValue("predictions", unknown[0], f"images that have captions; {len(unknown)} have none")
    if not predictions:
        raise BadValue("predictions", 0, "at least one caption")
    scores, tokenised = CaptionScores({}, {}), list[Captions]()
    if len(lacking) < len(METRICS):
        given = ({i: references[i] for i in predictions}, {i: [text] for i, text in predictions.items()})
        tokenised = [tokenise(captions) for captions in given]
    for scorer in _scorers():
        reason, values = lacking.get(scorer.metrics[0]), None
        if reason is None:
            try:
                values = scorer.score(*tokenised)
            # If a Java program dies, the pipe breaks, or an empty line comes instead of a number.
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                reason = f"{', '.join(scorer.metrics)} failed: {type(error).__name__}: {error}"
            if values is not None and not all(map(math.isfinite, values)):
                reason, values = f"{', '.join(scorer.metrics)} gave {values}", None
        for i, metric in enumerate(scorer.metrics):
            scores.values[metric] = None if values is None else float(values[i])
            if reason is not None:
                scores.reasons[metric] = reason
    return scores


def unavailable() -> dict[str, str]:
    """The metrics that cannot be computed on this machine, with reasons; programs call it before they caption.

    Raises ImportError without pycocoevalcap.
    """
    need("captions", "scoring captions", "pycocoevalcap")
    lacking = _tokenizer_lacks()
    reasons = {metric: lacking or scorer.lacks for scorer in _scorers() for metric in scorer.metrics}
    return {metric: reason for metric, reason in reasons.items() if reason is not None}


def tokenise(captions: Mapping[int, Sequence[str]]) -> Captions:
    """Make captions lower case, split them by the Penn Treebank's rules, and remove punctuation, for all metrics.

    It runs pycocoevalcap's jar itself: pycocoevalcap's class writes into its own folder, which may be read-only.
    """
    need("captions", "scoring captions", "pycocoevalcap")
    tokenizer = import_module("pycocoevalcap.tokenizer.ptbtokenizer")
    jar = _folder_of(tokenizer) / tokenizer.STANFORD_CORENLP_3_4_1_JAR
    # One caption per line, without other line ends: Java splits lines at more characters than `\n`.
    lines = [" ".join(text.split()) for texts in captions.values() for text in texts]
    with tempfile.TemporaryDirectory() as scratch:
        given = Path(scratch, "captions.txt")
        given.write_text("\n".join(lines), encoding="utf-8")
        options = ["-preserveLines", "-lowerCase", "-encoding", "utf-8", str(given)]
        program = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        run = subprocess.run([*program, *options], capture_output=True)
    found = run.stdout.decode("utf-8").split("\n")
    if run.returncode or len(found) < len(lines):
        told = run.stderr.decode(errors="replace").strip().splitlines()
        raise subprocess.SubprocessError(f"the PTB tokenizer failed: {told[0] if told else run.returncode}")
    tokens = iter(
        " ".join(word for word in line.split() if word not in tokenizer.PUNCTUATIONS) for line in found[: len(lines)]
    )
    return {image_id: [next(tokens) for _ in texts] for image_id, texts in captions.items()}


def _scorers() -> list[Scorer]:
    return [
        Scorer(METRICS[:4], lambda gts, res: _class("bleu", "Bleu")(4).compute_score(gts, res, verbose=0)[0]),
        Scorer(("METEOR",), _meteor, _meteor_lacks()),
        Scorer(("ROUGE-L",), lambda gts, res: [_class("rouge", "Rouge")().compute_score(gts, res)[0]]),
        Scorer(("CIDEr",), lambda gts, res: [_class("cider", "Cider")().compute_score(gts, res)[0]]),
        Scorer(("SPICE",), lambda gts, res: [_class("spice", "Spice")().compute_score(gts, res)[0]], _spice_lacks()),
    ]


def _class(module: str, name: str) -> Any:
    return getattr(import_module(f"pycocoevalcap.{module}.{module}"), name)


def _meteor(references: Captions, predictions: Captions) -> list[float]:
    meteor = _class("meteor", "Meteor")()
    try:
        return [meteor.compute_score(references, predictions)[0]]
    finally:
        # If its Java program died, the lock is still held, and the destructor would wait for it forever.
        if meteor.lock.locked():
            meteor.lock.release()


def _folder_of(module: Any) -> Path:
    """The folder of a scorer's module, in which its jars are."""
    return Path(module.__file__).parent


def _tokenizer_lacks() -> str | None:
    """Why the tokenizer of all metrics does not work on this machine, or None; it is tried on one word."""
    if shutil.which("java") is None:
        return (
            "the tokenizer of all these metrics needs Java, and there is no java on the PATH "
            "(Debian: apt-get install default-jre-headless)"
        )
    try:
        return None if tokenise({0: ["Dog"]}) == {0: ["dog"]} else "the PTB tokenizer does not work with this Java"
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)


def _meteor_lacks() -> str | None:
    meteor = import_module("pycocoevalcap.meteor.meteor")
    jar = _folder_of(meteor) / meteor.METEOR_JAR
    return None if jar.is_file() else f"METEOR needs {jar.name} in pycocoevalcap/meteor"


def _spice_lacks() -> str | None:
    """Which of SPICE's two CoreNLP jars are missing, or None. pycocoevalcap would download them."""
    folder = _folder_of(import_module("pycocoevalcap.spice.spice")) / "lib"
    missing = [name for name in SPICE_JARS if not (folder / name).is_file()]
    if not missing:
        return None
    return (
        f"SPICE needs {' and '.join(missing)} in pycocoevalcap/spice/lib: copy them from Stanford CoreNLP 3.6.0 "
        "(2015-12-09), or run python -m pycocoevalcap.spice.get_stanford_models, which downloads them"
    )
