"""Write the card and the plot of every adapter in model_cards/ again, from the JSON beside it.

make model-cards
python recipes/model_cards.py path/to/adapters   # another folder of adapter folders
"""

import sys
from pathlib import Path

from dtem_hf.configuration import CONFIG_NAME
from dtem_hf.files import read_json
from dtem_hf.hub.folder_card import write_card
from dtem_hf.hub.layout import EVALUATION_NAME
from dtem_hf.report.plots import plot_accuracy


MODEL_CARDS = Path(__file__).resolve().parents[1] / "model_cards"


def main(folder: Path) -> None:
    for adapter in sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}")):
        if (adapter / EVALUATION_NAME).is_file():
            evaluation = read_json(adapter / EVALUATION_NAME)
            if "kl" in evaluation["rows"][0]:  # else it is of a dense head, and has a picture of maps
                plot_accuracy(evaluation["rows"], adapter / "accuracy.png", title=evaluation["model"]["name"])
        print(f"written: {write_card(adapter)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL_CARDS)
