"""`lbaccel export`: a run as a folder that timm and the hub load, with a model card."""
