"""The settings of `lbaccel train`, and the objects that it builds from them."""
