"""BLEU, METEOR, ROUGE-L, CIDEr and SPICE as COCO's caption evaluation computes them, by pycocoevalcap.

This module calls the scorers one by one. `COCOEvalCap.evaluate` would build SPICE first, which starts a download, and
would return no score if that fails. A metric that cannot be computed is None, with the reason. Nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import BadValue, need


METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
SPICE_VARIABLE = "DTEM_HF_SPICE_JARS"
_SPICE_MEMORY = "8G"

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


def score_captions(
    references: Mapping[int, Sequence[str]], predictions: Mapping[int, str], spice_jars: str | None = None
) -> CaptionScores:
    """Score one prediction per image against the references of that image.

    `spice_jars` is a folder with SPICE_JARS (left out: the environment variable DTEM_HF_SPICE_JARS, or SPICE's own
    folder). Raises ValueError for a prediction without references, and ImportError without pycocoevalcap.
    """
    lacking = unavailable(spice_jars)
    unknown = [image_id for image_id in predictions if not references.get(image_id)]
    if unknown:
        raise BadValue("predictions", unknown[0], f"images that have captions; {len(unknown)} have none")
    if not predictions:
        raise BadValue("predictions", 0, "at least one caption")
    scores, tokenised = CaptionScores({}, {}), list[Captions]()
    if len(lacking) < len(METRICS):
        given = ({i: references[i] for i in predictions}, {i: [text] for i, text in predictions.items()})
        tokenised = [tokenise(captions) for captions in given]
    for scorer in _scorers(spice_jars):
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


def unavailable(spice_jars: str | None = None) -> dict[str, str]:
    """The metrics that cannot be computed on this machine, with reasons; programs call it before they caption.

    Raises ImportError without pycocoevalcap.
    """
    need("captions", "scoring captions", "pycocoevalcap")
    lacking = _tokenizer_lacks()
    reasons = {metric: lacking or scorer.lacks for scorer in _scorers(spice_jars) for metric in scorer.metrics}
    return {metric: reason for metric, reason in reasons.items() if reason is not None}


def tokenise(captions: Mapping[int, Sequence[str]]) -> Captions:
    """Make captions lower case, split them by the Penn Treebank's rules, and remove punctuation, for all metrics.

    It runs pycocoevalcap's jar itself: pycocoevalcap's class writes into its own folder, which may be read-only.
    """
    need("captions", "scoring captions", "pycocoevalcap")
    tokenizer = import_module("pycocoevalcap.tokenizer.ptbtokenizer")
    jar = _package_folder("tokenizer") / tokenizer.STANFORD_CORENLP_3_4_1_JAR
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


def find_spice_jars(folder: str | None = None) -> tuple[Path | None, str | None]:
    """The folder with SPICE's two CoreNLP jars, or None and a message that says which jar is missing where."""
    given = folder or os.environ.get(SPICE_VARIABLE)
    place = Path(given) if given else _package_folder("spice") / "lib"
    missing = [name for name in SPICE_JARS if not (place / name).is_file()]
    if not missing:
        return place, None
    where = str(place) if given else "pycocoevalcap/spice/lib"
    return None, (
        f"SPICE needs {' and '.join(missing)} in {where}: unpack Stanford CoreNLP 3.6.0 (2015-12-09) and name its "
        f"folder with --spice_jars or {SPICE_VARIABLE}"
    )


def _scorers(spice_jars: str | None) -> list[Scorer]:
    jars, missing_jars = find_spice_jars(spice_jars)
    return [
        Scorer(METRICS[:4], lambda gts, res: _class("bleu", "Bleu")(4).compute_score(gts, res, verbose=0)[0]),
        Scorer(("METEOR",), _meteor, _meteor_lacks()),
        Scorer(("ROUGE-L",), lambda gts, res: [_class("rouge", "Rouge")().compute_score(gts, res)[0]]),
        Scorer(("CIDEr",), lambda gts, res: [_class("cider", "Cider")().compute_score(gts, res)[0]]),
        Scorer(("SPICE",), lambda gts, res: [_spice(gts, res, jars)], missing_jars),
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


def _package_folder(part: str) -> Path:
    spec = find_spec("pycocoevalcap")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / part


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
    jar = _package_folder("meteor") / import_module("pycocoevalcap.meteor.meteor").METEOR_JAR
    return None if jar.is_file() else f"METEOR needs {jar.name} in pycocoevalcap/meteor"


def _spice(references: Captions, predictions: Captions, jars: Path | None) -> float:
    """SPICE's mean F-score. pycocoevalcap's own class would look for its jars in one place only, and download them."""
    assert jars is not None
    folder = _package_folder("spice")
    classes = os.pathsep.join([str(folder / "spice-1.0.jar"), str(folder / "lib" / "*"), str(jars.resolve() / "*")])
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch, "input.json"), Path(scratch, "output.json")
        items = [{"image_id": i, "test": predictions[i][0], "refs": references[i]} for i in predictions]
        given.write_text(json.dumps(items), encoding="utf-8")
        program = ["java", f"-Xmx{_SPICE_MEMORY}", "-cp", classes, "edu.anu.spice.SpiceScorer"]
        run = subprocess.run(
            [*program, str(given), "-out", str(made), "-subset", "-silent"], capture_output=True, text=True
        )
        if run.returncode or not made.is_file():
            raise subprocess.SubprocessError((run.stderr.strip() or f"exit code {run.returncode}")[-300:])
        scores = [float(item["scores"]["All"]["f"]) for item in json.loads(made.read_text(encoding="utf-8"))]
    return sum(scores) / len(scores)
