"""Put a run's tables, plots and pictures on one page.

python recipes/report.py --folders runs/compare runs/analysis --output runs/report.html
"""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("report.page")
