"""Real DistributedDataParallel beside one process of lbaccel."""
