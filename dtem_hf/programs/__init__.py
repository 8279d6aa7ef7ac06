"""What all command-line programs share: arguments, and the conditions of a result."""

# Programs that read their own arguments, `--help` included: the module whose `main` runs, and what it does.
PROGRAMS = {
    "quickstart": ("quickstart", "Train, merge, measure and save a small model, on a CPU."),
    "train": ("training.program", "Learn a merge embedding for a frozen backbone."),
    "evaluate": ("evaluation.classification", "Measure accuracy, or features, and speed with and without merging."),
    "evaluate-dense": ("evaluation.dense", "Compare a dense head's maps with and without merging."),
    "benchmark": ("benchmark.program", "Measure multiply-adds, speed and memory, without any images."),
    "compare": ("evaluation.comparison", "Compare methods at equal multiply-adds: table, plots, intervals."),
    "analyze": ("evaluation.analyze", "Say what an adapter has learned, beside attention keys."),
    "calibrate": ("evaluation.calibrate", "Search for the r of every layer that costs a model least."),
    "report": ("report.page", "Put the tables and pictures of runs on one page."),
    "evaluate-captions": ("evaluation.captions", "Score captions with and without merging."),
    "evaluate-segmentation": ("evaluation.segmentation", "Measure segmentation with and without merging."),
    "advise": ("benchmark.advise", "Say which r to take on this machine for your images, and whether it pays."),
    "export": ("deploy.program", "Write a merged model for ONNX Runtime or AOTInductor, and check it against eager."),
}
