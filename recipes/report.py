"""Put a run's tables, plots and pictures on one page.

python recipes/report.py --folders runs/compare runs/analysis --output runs/report.html
"""

from dtem_hf.programs.arguments import run_script
from dtem_hf.report.page import main


if __name__ == "__main__":
    run_script(main)
