"""The numbers by which a run is judged, each with its reason. Tune them here.

Factors are of norms, and are compared in logarithms: norms vary by factors, so that
their logarithms have nearly the same spread early and late in training.
"""

from math import log

# Fewer steps than this say nothing of a rate, a level or a spread.
LEAST_STEPS = 40
# A local level is the median of this many steps before or after a step. A spike of up
# to half as many steps leaves it as it is.
WINDOW = 25
# At least so many of them must be recorded.
LEAST_IN_WINDOW = 5

# Spikes. The tail of the norms above their level is fitted between these quantiles,
# and reaches the margin 0.1 times a run by chance. An exponential tail of logarithms is
# too long, one that bends as a Weibull tail is too short: the margin is halfway. Of
# 981 healthy runs that were trained for this (benchmarks/diagnosis), eight have a norm
# above it.
TAIL = (0.80, 0.95)
FALSE_SPIKES = 0.1
# A smaller factor does no harm, however quiet the rest is.
SPIKE = log(3.0)
# Frequent spikes are a part of the tail that is fitted; no margin is above so many
# standard deviations.
MOST_DEVIATIONS = 12.0
# The noise around a step is that of so many steps; it is at least this part of the
# noise of the run.
NOISE_STEPS = 100
NOISE_LEAST = 0.25
# Spikes of neighbouring steps are one.
SPIKE_GAP = 3
# How many steps a loss has to come back to its level after a spike, and how many
# deviations above that level it may remain.
RECOVERY_STEPS = 30
RECOVERY_DEVIATIONS = 3.0
# Spikes at equal distances: by chance, three gaps agree to 2% once in 600 runs. So many
# that no single one has to be beyond chance: one a run is.
FALSE_PERIODIC = 1.0
PERIODIC_LEAST = 4
PERIODIC_TOLERANCE = 0.02
PERIODIC_SHARE = 0.75
# Where single ones are not beyond chance, distances between so many of the highest of
# the first steps are tried. Some of them are beyond chance together once in 50 runs.
FOLDED_PEAKS = 16
FOLDED_STEPS = 10_000
FOLDED_FALSE = 0.02

# A level shift: a batch four times as large halves the norm of pure noise, and loss
# scales change by two. It has to stay for 100 steps. Drift over tens of steps is none:
# two levels have to explain more of the 50 steps before and after it than a straight
# line does, by this factor. Of a steady drift, they explain three quarters as much.
SHIFT = log(1.8)
# A fall to no less than a third is for information: norms also fall as a model learns.
SHIFT_FALL = log(3.0)
SHIFT_DEVIATIONS = 3.0
# Where norms are so noisy that few changes are three deviations: so many times the
# largest change of the rest of the run.
SHIFT_OTHERS = 1.4
SHIFT_SHARP = 1.05
# Of the pairs of a step before and one after, 85% have to differ in the direction of
# the shift, and 15% in the other: by chance this difference has a deviation of 0.12.
SHIFT_RANK = 0.7
# Of a change that is so many times all others, fewer pairs have to differ: some
# batches have next to no gradient, before a shift and after it.
SHIFT_ALONE = 3.0
SHIFT_RANK_ALONE = 0.6
SHIFT_STAYS = 0.7
SHIFT_EARLY = 0.05  # of the run, in which norms find their level
# They may do so up to here, and have to change by more than they do elsewhere.
SHIFT_SETTLED = 0.2
SHIFT_EARLY_DEVIATIONS = 8.0
SHIFT_SIDE = 50  # steps that have to be there before and after it

# Growth of norms: healthy norms double or triple while the loss falls. They grow
# without good where it does not fall, and before a divergence.
PIECES = 40  # into which a run is cut to see its course
GROWTH = log(10.0)
GROWTH_BEFORE_DIVERGENCE = log(3.0)
GROWTH_RANK = 0.9  # correlation of the ranks of level and time
GROWTH_PIECES = 5
# Pieces, and the quantile that is the level of each. While batches without any loss
# grow more frequent, medians fall or vary; the upper quarter of long pieces does not.
GROWTH_LEVELS = ((PIECES, 0.5), (10, 0.75))
# Before a divergence it is looked for in the last parts, too: while a run learns well,
# its norms take another course, and would hide it.
GROWTH_PARTS = (1, 3 / 4, 1 / 2, 1 / 4, 1 / 16)
# Growth begins after the last level that is above the lowest by no more of it.
GROWTH_FLAT = 0.1
GROWTH_ABOVE = log(2.0)  # the level before: norms that fell and came back are none
GROWTH_AFTER = 0.3  # of the run: it diverges slowly, and its norms may grow meanwhile
GROWTH_AT_ONCE = 0.7  # the part of it within one piece, which is then a level shift
PEAK_RISE = 0.9  # the learning rate starts below this part of its maximum
PEAK_NEAR = 0.05  # of the run: growth that starts so close to the maximum is named so
WARNED = log(2.0)  # above the lowest level: here a rule would have warned

# Explosions in the first steps, before levels and noise are known. Norms and losses
# that grow a hundredfold and then are not finite have exploded; where they stay finite,
# a thousandfold, as norms may rise from next to nothing while a run learns.
EXPLODED_STEPS = 100  # finite ones, of a run that is not finite at its end
EXPLODED_TO_NONFINITE = log(100.0)
EXPLODED = log(1000.0)
EXPLODED_ABOVE = log(10.0)  # all values before: a value that comes back has not grown
EXPLODED_RISING = 2  # steps of growth; one may be a bad batch, but for the first steps

# Explosions at the end of a longer run: of so many last steps, above the highest of so
# many steps before them.
EXPLODED_TAIL = 50
EXPLODED_BESIDE = 100

# A learning rate that doubles within so many steps has jumped; a warm-up doubles so
# fast in its first steps alone. It explains a divergence that begins so many steps
# later, or a little earlier, as the first step of growth is estimated.
JUMP = log(2.0)
JUMP_WITHIN = 4
JUMP_FIRST = 11  # steps before it
JUMP_LEAD = WINDOW
JUMP_LATE = 5

# A schedule that falls to a third and norms that double meanwhile.
SCHEDULE_FALL = log(3.0)
SCHEDULE_RISE = log(1.5)
SCHEDULE_RANK = -0.8
SCHEDULE_PART = 0.3  # of the steps, for which they have to rise
SCHEDULE_PIECES = (PIECES, 12)  # the levels of long pieces vary less
SCHEDULE_ERRORS = 3.0  # of a difference of two levels: the lowest is one of many

# A loss that gave back much of what it had gained, by more than its noise.
LOST_SHARE = 0.4
# A loss below zero may be a surrogate, as in policy gradients, which goes back to zero
# when the policy is sure. There it has to lose four times what it had gained.
LOST_SHARE_BELOW_ZERO = 4.0
LOST_DEVIATIONS = 2.0  # of one step, which are eight of the medians that are compared
# A loss that has diverged is noisy: of the noise at its end that of a median counts.
LOST_END = 0.25
LOST_PART = 0.3  # of the best level, where losses are positive
DEPARTED_DEVIATIONS = 4.0
DEPARTED_GOOD = 0.2  # of the steps may be on the good level after that
DEPARTED_PART = 0.02  # of what is lost, where there is next to no noise

# A step of the updates' norm before that of the loss: within so many steps. The loss
# is looked at where the updates rose, and nowhere else: a step that is so many
# deviations above those before is beyond chance there.
UPDATE_LEAD = 20
UPDATE_RISE = log(1.5)
LOSS_RISE = log(1.2)
FALSE_RISES = 0.01  # norms of updates a run that rise so far by chance
LED_DEVIATIONS = 5.0
LED_STEPS = 5  # above all losses before, or so many of them

# Clipped steps. A rule that is to clip 90% clips more while norms rise; it is off its
# target where it lets pass fewer than a fiftieth of the steps that it is to let pass.
ALWAYS = 0.95
PASS_PART = 0.02
ALWAYS_STRETCH = 0.5  # of the run, up to its end
NEVER_STEPS = 200
NEVER_FAR = 10.0  # a threshold so many times the 99% quantile lets pass any spike

# A warm-up spike is in the first part of a run, and blinds a rule whose threshold then
# is far above the norms of the steps after it.
WARMUP_PART = 0.2
WARMUP_STEPS = 200
WARMUP_SPIKE = log(5.0)
FALSE_WARMUP = 0.3  # norms a run that are as high by chance: few of them blind a rule
WARMUP_ALONE = 10  # steps after it, above whose level it is a spike, too
BLIND = 4.0
BLIND_STEPS = 50
BLIND_PART = 0.1

# Leaves.
DOMINANT = 0.9  # fraction of the squared norm, in most of the steps
DOMINANT_FACTOR = 5.0  # above the next largest leaf's norm
LEAST_LEAVES = 3
STARVED = 5.0  # how much smaller all other leaves' steps are by the dominant one
STARVED_STEPS = 0.5  # fraction of the steps
DEAD_STEPS = 50
DEAD = 1e-6  # of the median leaf, and of the leaf's own earlier level

# Depth: a factor of 100 from the first layer to the last, over at least four.
LEAST_DEPTH = 4
DEPTH_FACTOR = log(100.0)
DEPTH_RANK = 0.8

# Skipping locks out where so many steps in a row are skipped.
LOCKED_STEPS = 50
LOCKED_PART = 0.1
LOCKED_SHARE = 0.9  # of the steps since it began; a lower norm may pass now and then
# A single non-finite step may be chance, as with a loss scale that is being found.
NONFINITE_STEPS = 5
