"""Compare methods at the same cost: tables as Markdown, CSV and JSON, and a Pareto plot; `--help` has examples."""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("evaluation.comparison")
