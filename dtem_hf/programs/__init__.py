"""Shared code of all command-line programs: arguments, output folders, processes, and the conditions of a result."""

# Programs that parse their own arguments, `--help` included: the module whose `main` runs, and a summary.
PROGRAMS = {
    "quickstart": ("quickstart", "Train, merge, measure and save a small model, on a CPU."),
    "train": ("training.program", "Learn a merge embedding for a frozen backbone."),
    "evaluate": ("evaluation.classification", "Measure accuracy, or features, and speed with and without merging."),
    "evaluate-dense": ("evaluation.dense", "Compare a dense head's maps with and without merging."),
    "benchmark": ("benchmark.program", "Measure multiply-adds, speed and memory, without any images."),
    "compare": ("evaluation.comparison", "Compare methods at equal multiply-adds: table, plots, intervals."),
    "analyze": ("evaluation.analyze", "Compare the token similarities of an adapter with those of attention keys."),
    "calibrate": ("evaluation.calibrate", "Search for the r of every layer that changes a model's outputs least."),
    "report": ("report.page", "Put the tables and pictures of runs on one page."),
    "evaluate-captions": ("evaluation.captions", "Score captions with and without merging."),
    "evaluate-segmentation": ("evaluation.segmentation", "Measure segmentation with and without merging."),
    "advise": ("benchmark.advise", "Say which r to take on this machine for your images, and whether it pays."),
    "export": (
        "deploy.program",
        "Export a merged model to ONNX, OpenVINO or AOTInductor, and compare it with the eager model.",
    ),
}
