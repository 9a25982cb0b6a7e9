"""The probe in training that runs in several processes. :mod:`~zerosum.distributed.ddp` is what it has to know of
DistributedDataParallel; reports are added up over the ranks by :meth:`zerosum.Report.all_reduce`."""
