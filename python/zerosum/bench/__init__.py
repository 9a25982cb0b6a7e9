"""What statistics of per-example gradients cost on this machine, against other ways to them: what ``zerosum bench`` runs.

``workload``, ``ops``   what is computed: a training step, one weight; ``cases`` gives them sizes, ``statistics`` their results
``ways``, ``peers``     how: by this library and by PyTorch alone, by other projects
``timing``, ``memory``, ``accuracy``   the three measurements, which ``run`` takes for every way
``result``, ``picture``   show them; ``machine`` says where they were taken
"""
