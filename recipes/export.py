"""Export a merged model for ONNX Runtime, OpenVINO or AOTInductor, and compare; `--help` has examples."""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("deploy.program")
