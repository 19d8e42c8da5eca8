"""A model of the protocol of low-latency mode, small enough to look at every interleaving.

The protocol
============

Every rank owns landing buffers into which its peers write. Dispatch and combine have buffers of their own and count
rounds of their own, so one of them is modelled. A round has two phases: in the send S(n) a rank writes to its peers, in
the receive R(n) it reads what they wrote in their S(n). S(1), S(2), ... are launched in this order, R(n) after S(n),
and S(n) only when R(n - k) and all receives before it have been launched: k rounds are in flight.

*Who writes what.* S(n) of rank i writes to every rank j a packet, also when it has no rows for j, into place i of table
n mod T of j, and words of rows, if it has any for j, into place i of row buffer n mod B of j. Words become visible to j
one by one, in any order and at any later time; no fence orders them.

*Who reads what.* A word that has not been written holds a value that data never has: it is empty. R(n) of j waits until
the packets of all ranks are in table n mod T, learns from them which rows come, waits for every word of these in row
buffer n mod B, and empties each as it reads it. All blocks of a GPU read the table, so none can empty it while it reads
it. Two ways out: table n is cleared in the next receive (or send) that is launched, or its words carry their round, so
that what is left of an older round counts as empty and nothing is ever cleared.

*Why a buffer is free when it is written again.* Let rank i write in S(n + B) to rank j. Before, R(n + B - k) of i has
ended, which heard from all ranks, so j had started S(n + B - k). With B = 2k that is S(n + k), which j starts after its
R(n) has ended, where the words in question were read and emptied. Every link of the chain is needed: fewer buffers, a
rank that is silent when it has no rows, a bound on rounds in flight by their count (an old one may then wait for ever),
or a send that starts while a block of an earlier receive still runs, each break it. A table whose words carry their
round is free at the same time: T = 2k. One that the next receive clears is free one receive later: T = 2k + 1 if
receives come in order. If they come in any order, two rounds in flight may be received as R(n + 1), R(n), and only the
receive after that clears table n: T = 2k + 2. If the next send clears it, T = 2k + 1 in any order.

*Combine with weights.* There S(n) of a rank also asks its peers: it writes them the routing weights of its tokens, and
they wait for these before they write rows (the sums) in their S(n). A row is then written only after its reader has
started S(n), so after R(n - k) of the reader has ended: k row buffers do. The weights themselves are free once the rows
that they asked for have come, so such a combine needs no packets either. Weights that travel with the rows of a
dispatch are words of them, and the combine asks for nothing: it needs the packets, and 2k row buffers.

*Why nobody waits for ever.* R(n) waits only for S(n) of its peers, which waits for nothing, or for weights that peers
write at the start of their S(n). If a rank dies, all others end up in a receive that waits for it, and those in the
earliest one wait for it alone. Others may have got further, up to k rounds: they wait for it, and for ranks that are
stuck behind it.

The model
=========

A state holds, for every rank, the kernels it runs with what their blocks have left to do, and the words that are not
empty. ``explore`` visits every state that can be reached and stops at the first violation:

- a word is written (visible) while its buffer still holds a word of an earlier round;
- a word is written while the one of an earlier round in its buffer is under way (with ``every_step``): between nodes it
  is put from a staging place, of which there are as many as buffers;
- a read returns a word of another round;
- a clear destroys a word that some reader has not read, or that belongs to another round;
- nobody can go on, although someone has not finished.

Nothing depends on the number of a round except its buffer, so states that differ by a shift of all rounds are the same
state. Without a bound on rounds the search therefore still ends, and what it shows holds for any number of rounds.

Reductions
==========

With ``every_step`` every single write, its arrival, every read and every clear is a step of its own, in all orders.
Without, these orders are left out (the tests check that both find the same):

1. *Words arrive when they are written, and writing to a word that is not free is already the violation.* Only rank i
   writes to place i, so a word that is free when it is written stays free until it arrives; and if it is not free, the
   word may arrive at once, onto the earlier one. A word that arrives late only delays readers, which the search does
   anyway by letting them be slow: they wait for words, and never act on the absence of one.
2. *Some steps are taken as soon as they can be, and no other is tried first*: writing to a free word, and taking a word
   of a row. They commute with all that others can do: the word has one writer and one reader, and neither step makes a
   word free. Two more are of this kind: reading a table whose clearing is ordered behind the whole receive, and
   launching a receive when nothing of the rank runs and nothing else can be launched.
3. *Clears come last, and together*: emptying words delays nobody, and makes the words free; so a violation that exists
   when some are cleared early exists when they are not. The clears by which a block may destroy what another has not
   read are taken at any time, but still together: those before the offending one can be put off until it. The same goes
   for reads of a table that race with its clearing, or that make it free by themselves.

Kernels and blocks
==================

``order`` says what is known when a block runs: ``"stream"``, all blocks of earlier kernels have ended; ``"events"``,
only R(n - k) and S(n - 1) have ended before S(n), and S(n) before R(n), as when receives run on other streams;
``"block"``, the same block of earlier kernels has ended; ``"early"``, all blocks of the kernel ahead have started, as
with programmatic dependent launch, and in the phases in ``waits`` the kernel ahead has ended (griddepcontrol.wait).
That a kernel has ended says nothing about the one ahead of it, unless it waited for it.
"""
