"""Write the card and the plot of every adapter in model_cards/ again, from the JSON beside it.

make model-cards
python recipes/model_cards.py path/to/adapters   # another folder of adapter folders
"""

from dataclasses import dataclass
from pathlib import Path

from dtem_hf.configuration import CONFIG_NAME
from dtem_hf.errors import BadValue
from dtem_hf.files import read_json
from dtem_hf.hub.folder_card import write_card
from dtem_hf.hub.layout import EVALUATION_NAME
from dtem_hf.programs.arguments import option, parse_arguments, run_script
from dtem_hf.report.plots import plot_accuracy


@dataclass(kw_only=True)
class CardsArguments:
    """Write cards and plots again."""

    folder: str = option("folder of adapter folders", default=str(Path(__file__).resolve().parents[1] / "model_cards"))


def main() -> None:
    folder = Path(parse_arguments(CardsArguments, None, __doc__ or "", leading=("folder",)).folder)
    adapters = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    if not adapters:
        raise BadValue("folder", str(folder), f"a folder of adapter folders, each with a {CONFIG_NAME}")
    for adapter in adapters:
        if (adapter / EVALUATION_NAME).is_file():
            evaluation = read_json(adapter / EVALUATION_NAME)
            if "kl" in evaluation["rows"][0]:  # cards of dense heads have a picture of maps instead
                plot_accuracy(evaluation["rows"], adapter / "accuracy.png", title=evaluation["model"]["name"])
        print(f"written: {write_card(adapter)}")


if __name__ == "__main__":
    run_script(main)
