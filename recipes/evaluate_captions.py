"""Evaluate captions: score a result file by BLEU, METEOR, ROUGE-L, CIDEr and SPICE.

python recipes/evaluate_captions.py --annotations captions_val2014.json --predictions results.json --output scores.json
"""

from dtem_hf.evaluation.captions import main


if __name__ == "__main__":
    main()
