"""From images to a model that one can judge, use and hand on."""
