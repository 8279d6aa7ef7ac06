"""The analysis program, end to end on small images."""

import json

import pytest

from dtem_hf import AutoModelForImageClassification, BadValue, DTEMConfig
from dtem_hf.evaluation.analyze import AnalyzeArguments, main
from tests.support.runs import flags


def test_correlation_pictures_and_page_of_an_adapter(vit_folder, image_folder, tmp_path, capsys):
    model = AutoModelForImageClassification.from_pretrained(vit_folder, merge=DTEMConfig(r=2))
    for parameter in model.merge_parameters():
        parameter.data += 0.05 * parameter.new_ones(()).expand_as(parameter).cumsum(0)
    model.save_merge_adapter(tmp_path / "adapter")
    options = {
        "model": vit_folder,
        "data": image_folder,
        "adapter": tmp_path / "adapter",
        "output_dir": tmp_path / "o",
    }
    main(flags(options, limit=5, batch_size=2, r=2, pictures=2))
    record = json.loads((tmp_path / "o" / "correlation.json").read_text())
    assert [row["blocks"] for row in record["rows"]] == ["1–2", "3–3", "4–4"]
    assert all(row["before"] == pytest.approx(1, abs=2e-3) and row["after"] < 0.99 for row in record["rows"])
    assert record["data"]["num_images"] == 5 and len(record["layers"]["after"]) == 4
    page = (tmp_path / "o" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "before training" in capsys.readouterr().out


def test_bad_options_are_named():
    for name in ("limit", "pictures", "batch_size"):
        with pytest.raises(BadValue, match=f"{name}=0"):
            AnalyzeArguments(model="m", data="d", adapter="a", **{name: 0})
