"""The probe in training that runs in several processes.

:mod:`~zerosum.distributed.ddp` is what it has to know of DistributedDataParallel, and :mod:`~zerosum.distributed.sharded` refuses
models whose parameters are shards. Reports are added up over the ranks by :meth:`zerosum.Report.all_reduce`.
"""
