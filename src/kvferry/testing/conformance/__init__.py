"""The conformance suite: what every transport must guarantee (T1 to T7 of the handoff protocol), as pytest classes.

For a transport of your own, register it and subclass in a test module::

    from kvferry.testing.conformance import TransportConformance

    class TestMine(TransportConformance):
        transports = ("mine",)
        plugin = "my_package.register_mine"   # imported by the owner's process

Each test moves bytes between this process and one that owns the memory, through a TransferEngine that may use this
transport only, so that what users see is what is tested.
"""

from __future__ import annotations

from kvferry.testing.conformance.case import BLOCK, Case, offsets, shuffled, wait_until
from kvferry.testing.conformance.ends import Ends
from kvferry.testing.conformance.placement import Placement
from kvferry.testing.conformance.refusals import Refusals
from kvferry.testing.conformance.words import LeaseWords

__all__ = ["BLOCK", "Case", "TransportConformance", "offsets", "shuffled", "wait_until"]


class TransportConformance(Placement, LeaseWords, Refusals, Ends):
    """Subclass it and name the transport; see the module's docstring.

    `shared`: the owner's memory is shared memory (else plain arrays). `own_process`: the owner runs in a process of
    its own. `one_sided`: the owner's process takes no part in a read, so that a stopped one does not hinder it.
    `over_network`: reaches other hosts. `many_blocks`: of 64 KiB, so many that reading them takes a while.
    `word_stands_s`: how long a busy owner leaves a lease's word as it is; a small read must often fit into that.
    `num_connects`: how often peers come and go in the test of what they leave behind.
    """
