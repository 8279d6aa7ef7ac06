"""Export a merged model for ONNX Runtime, OpenVINO or AOTInductor, for any batch size, and compare it with eager.

python recipes/export.py --model facebook/deit-small-patch16-224 --method tome --r 16
python recipes/export.py --model facebook/deit-small-patch16-224 --merge me/dtem-deit-small --formats onnx openvino
python recipes/export.py --model path/to/config --random_weights True --method none    # the plain model
"""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("deploy.program")
