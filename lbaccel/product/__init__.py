"""A trained model as a product: judged on images, and used on new ones."""
