"""The recipes that others publish: timm, torchvision, Accelerate, DeepSpeed, plain numbers."""
