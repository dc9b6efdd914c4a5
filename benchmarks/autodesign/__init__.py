"""Trials of rules for `auto_clip` on small tasks, other than those of clipbench.

How the rule of `auto_clip` is chosen, written down before it has seen any task of the
second half of clipbench, or lmbench:

1. Every design runs on the 48 cells of this benchmark, a task with an optimizer each. A
   design is out if it diverges in a cell in which the best fixed threshold that was
   chosen by other seeds does not.
2. Of the others, those count whose share of cells within 3% of the best fixed threshold
   is at most two cells below the largest share: smaller differences are noise.
3. Of these the one is chosen whose loss over that of the best fixed threshold has the
   lowest geometric mean, where a factor above 5 counts as 5.
4. Designs whose geometric means differ by less than 1% are equal. Of equal designs the
   one is chosen that also bounds the threshold by the usual norm, as it still limits
   spikes after the norms have fallen.

The design that this chooses then runs once on the second half of clipbench and on
lmbench. It becomes `auto_clip` if it is better there than AutoClip and than the first
design of `auto_clip`; it is not changed afterwards.
"""
