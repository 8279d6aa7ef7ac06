"""Models of the paper that transformers lacks, one file each. Importing this registers them with its Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForSemanticSegmentation

from .lv_vit import LVViTConfig, LVViTForImageClassification, LVViTModel
from .segmenter import SegmenterConfig, SegmenterForSemanticSegmentation, SegmenterModel


AutoConfig.register(LVViTConfig.model_type, LVViTConfig)
AutoModel.register(LVViTConfig, LVViTModel)
AutoModelForImageClassification.register(LVViTConfig, LVViTForImageClassification)
AutoConfig.register(SegmenterConfig.model_type, SegmenterConfig)
AutoModel.register(SegmenterConfig, SegmenterModel)
AutoModelForSemanticSegmentation.register(SegmenterConfig, SegmenterForSemanticSegmentation)
