"""The files of an adapter's folder or repository, beside `merge_config.json`."""

WEIGHTS_NAME = "merge_adapter.safetensors"
CARD_NAME = "README.md"
EVALUATION_NAME = "evaluation.json"
TRAINING_NAME = "training.json"
MODEL_CONFIG_NAME = "config.json"
# Pictures that a card shows if the folder holds them, with their captions.
PICTURES = {
    "maps.jpg": "Maps of a dense head, unmerged and merged",
    "accuracy.png": "Accuracy against multiply-adds",
    "features.png": "Cosine with the unmerged model's features against multiply-adds",
    "merged_tokens.png": "Merged tokens: each final token has one colour and one outline",
}
LARGEST_CARD = 1 << 20
