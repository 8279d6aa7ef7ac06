"""Put a run's tables, plots and pictures on one page; `--help` has examples."""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("report.page")
