"""Caption scores: the published figures, and what is said where Java or SPICE's jars are absent."""

import json
import math
import re
import shutil
import stat
import sys
from collections import Counter
from pathlib import Path

import pytest

from dtem_hf import BadValue
from dtem_hf.evaluation.captions_scoring import (
    METRICS,
    SPICE_JARS,
    SPICE_VARIABLE,
    score_captions,
    tokenise,
    unavailable,
)
from tests.support.children import run_python


pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")

ROOT = Path(__file__).parents[2]
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="the PTB tokenizer needs Java")
REFERENCES = {
    1: ["A brown dog runs over the grass.", "The dog is running in a field."],
    2: ["Two cats sleep on a sofa.", "Cats lie on the couch, asleep."],
    3: ["A man rides a red bicycle down the street."],
}
PREDICTIONS = {1: "A dog runs in the field", 2: "two cats on a couch", 3: "A red bus on the street"}


@pytest.fixture
def no_jars(monkeypatch, tmp_path):
    """Hide SPICE's jars, wherever they lie on this machine."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv(SPICE_VARIABLE, str(tmp_path / "empty"))


@pytest.fixture(autouse=True)
def _java_starts_quickly(monkeypatch):
    """Programs of some seconds are compiled no further than they need, and clean up in one thread."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")


def ngrams(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def slow_bleu(references, predictions, n):
    """Corpus BLEU by its definition, with the closest reference's length."""
    matched, total, ours, theirs = [0] * n, [0] * n, 0, 0
    for i, [text] in predictions.items():
        words, many = text.split(), [reference.split() for reference in references[i]]
        ours += len(words)
        theirs += min((abs(len(r) - len(words)), len(r)) for r in many)[1]
        for k in range(n):
            counts = ngrams(words, k + 1)
            total[k] += sum(counts.values())
            matched[k] += sum(min(c, max(ngrams(r, k + 1)[g] for r in many)) for g, c in counts.items())
    precision = math.exp(sum(math.log(m / t) for m, t in zip(matched, total, strict=True)) / n)
    return precision * min(1, math.exp(1 - theirs / ours))


def slow_rouge(references, predictions, beta=1.2):
    """Mean over images of ROUGE-L by its definition."""

    def common(a, b):
        if not a or not b:
            return 0
        if a[0] == b[0]:
            return 1 + common(a[1:], b[1:])
        return max(common(a[1:], b), common(a, b[1:]))

    scores = []
    for i, [text] in predictions.items():
        words, many = text.split(), [reference.split() for reference in references[i]]
        precision = max(common(words, r) / len(words) for r in many)
        recall = max(common(words, r) / len(r) for r in many)
        scores.append((1 + beta**2) * precision * recall / (recall + beta**2 * precision))
    return sum(scores) / len(scores)


@needs_java
def test_published_figures_by_the_recipes_command(shared, tmp_path):
    """MAGIC's file has images, captions and prediction in one list: it becomes COCO's two files in a few lines."""
    rows = json.loads((shared / "assets" / "captions" / "coco_magic_result.json").read_text())
    ids = [int(re.search(r"_0*(\d+)\.jpg", row["image_name"])[1]) for row in rows]
    images = [{"id": i, "file_name": row["image_name"]} for i, row in zip(ids, rows, strict=True)]
    captions = [(i, text) for i, row in zip(ids, rows, strict=True) for text in row["captions"]]
    annotations = [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(captions)]
    predictions = [{"image_id": i, "caption": row["prediction"]} for i, row in zip(ids, rows, strict=True)]
    (tmp_path / "A.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (tmp_path / "P.json").write_text(json.dumps(predictions))
    files = {"annotations": "A.json", "predictions": "P.json", "output": "S.json"}
    options = [text for name, file in files.items() for text in (f"--{name}", str(tmp_path / file))]
    run_python([ROOT / "recipes" / "evaluate_captions.py", *options], check=True)
    scores = json.loads((tmp_path / "S.json").read_text())
    published = {"BLEU-1": 0.568203, "BLEU-4": 0.128778, "METEOR": 0.173621, "ROUGE-L": 0.398795, "CIDEr": 0.492887}
    assert {name: scores[name] for name in published} == pytest.approx(published, abs=1e-4, rel=0)
    assert scores["num_images"] == 4982 and set(METRICS) <= set(scores)


@needs_java
def test_scores_against_their_definitions_and_no_spice_from_jars_that_do_not_work(tmp_path, monkeypatch):
    """Without METEOR, whose tables take Java seconds to read: it is among the published figures."""
    from pycocoevalcap.meteor import meteor

    monkeypatch.setattr(meteor, "METEOR_JAR", "absent.jar")
    for name in SPICE_JARS:
        (tmp_path / name).write_bytes(b"PK\x05\x06" + bytes(18))
    scores = score_captions(REFERENCES, PREDICTIONS, str(tmp_path))
    references, predictions = (
        {i: [re.sub(r"[^a-z ]", "", text.lower()) for text in texts] for i, texts in captions.items()}
        for captions in (REFERENCES, {i: [text] for i, text in PREDICTIONS.items()})
    )
    for n in (1, 2):
        assert scores.values[f"BLEU-{n}"] == pytest.approx(slow_bleu(references, predictions, n), abs=1e-9)
    assert scores.values["ROUGE-L"] == pytest.approx(slow_rouge(references, predictions), abs=1e-12)
    assert scores.values["SPICE"] is None and scores.reasons["SPICE"].startswith("SPICE failed")
    assert all((scores.values[name] is None) == (name in ("METEOR", "SPICE")) for name in METRICS)
    assert list(scores.values) == list(METRICS)


@needs_java
def test_line_ends_and_empty_captions_keep_their_places():
    """A line end inside a caption must not shift all that come behind it."""
    tokens = tokenise({1: ["A dog\u2028runs\x85fast.\r\n", ""], 2: ["It's  here;\x0bthere"], 3: [""]})
    assert tokens == {1: ["a dog runs fast", ""], 2: ["it 's here there"], 3: [""]}


def test_without_java_everything_is_null_with_the_reason(monkeypatch, no_jars, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = score_captions(REFERENCES, PREDICTIONS)
    assert scores.values == dict.fromkeys(METRICS)
    assert all("no java on the PATH" in scores.reasons[name] for name in METRICS)


@needs_java
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # METEOR's destructor meets a dead Java
def test_a_scorer_that_dies_takes_no_other_with_it_and_spice_needs_its_jars(no_jars, monkeypatch, tmp_path):
    from pycocoevalcap.meteor import meteor

    (tmp_path / "broken.jar").write_bytes(b"no jar")
    monkeypatch.setattr(meteor, "METEOR_JAR", str(tmp_path / "broken.jar"))
    scores = score_captions(REFERENCES, {**PREDICTIONS, 3: REFERENCES[3][0]})
    assert scores.values["METEOR"] is None and scores.reasons["METEOR"].startswith("METEOR failed")
    assert scores.values["CIDEr"] is not None and scores.values["BLEU-1"] is not None
    assert scores.values["SPICE"] is None and list(scores.reasons) == ["METEOR", "SPICE"]
    assert SPICE_JARS[0] in scores.reasons["SPICE"] and "--spice_jars" in scores.reasons["SPICE"]


@needs_java
def test_what_a_scorer_lacks_is_known_before_anything_is_scored(no_jars, monkeypatch):
    from pycocoevalcap.meteor import meteor
    from pycocoevalcap.tokenizer import ptbtokenizer

    monkeypatch.setattr(meteor, "METEOR_JAR", "absent.jar")
    assert unavailable()["METEOR"] == "METEOR needs absent.jar in pycocoevalcap/meteor"
    monkeypatch.setattr(ptbtokenizer, "STANFORD_CORENLP_3_4_1_JAR", "absent.jar")
    reasons = unavailable()
    assert set(reasons) == set(METRICS) and all("PTB tokenizer failed" in reason for reason in reasons.values())


@needs_java
def test_tokenising_writes_nothing_into_the_package():
    """Site-packages may be read-only; pycocoevalcap's own class puts a file beside its jar."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    folder = Path(ptbtokenizer.__file__).parent
    before = folder.stat().st_mtime_ns
    assert tokenise(REFERENCES)[2][0] == "two cats sleep on a sofa"
    assert folder.stat().st_mtime_ns == before


@pytest.mark.parametrize("by_variable", [False, True])
def test_spice_runs_with_the_jars_of_a_folder(monkeypatch, tmp_path, by_variable):
    """A stand-in for Java takes SPICE's arguments: the real one needs jars that are not to be had everywhere."""
    from dtem_hf.evaluation.captions_scoring import _spice, find_spice_jars

    jars, tools = tmp_path / "jars", tmp_path / "tools"
    for folder in (jars, tools):
        folder.mkdir()
    for name in SPICE_JARS:
        (jars / name).touch()
    program = f"""#!{sys.executable}
import json, sys
classes, given, made = sys.argv[3], sys.argv[5], sys.argv[sys.argv.index("-out") + 1]
assert {str(jars)!r} in classes and "spice-1.0.jar" in classes
items = json.load(open(given))
scores = [0.5 if item["test"] in item["refs"] else 0.25 for item in items]
json.dump([{{"scores": {{"All": {{"f": score}}}}}} for score in scores], open(made, "w"))
"""
    (tools / "java").write_text(program)
    (tools / "java").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    monkeypatch.delenv(SPICE_VARIABLE, raising=False)
    if by_variable:
        monkeypatch.setenv(SPICE_VARIABLE, str(jars))
    found, missing = find_spice_jars(None if by_variable else str(jars))
    assert (found, missing) == (jars, None)
    assert _spice({1: ["a", "b"], 2: ["c"]}, {1: ["b"], 2: ["x"]}, found) == 0.375


def test_predictions_without_references_are_named():
    with pytest.raises(BadValue, match="predictions=9: images that have captions; 1 have none"):
        score_captions(REFERENCES, {1: "a", 9: "b"})
    with pytest.raises(BadValue, match="at least one caption"):
        score_captions(REFERENCES, {})
