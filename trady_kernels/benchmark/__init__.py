"""Times of the operators beside what one would otherwise run, and beside what the machine allows.

==========  ===============================================================================================
layers      the layers of real networks, as data
timing      interleaved medians, the allocator's settings
roofline    bytes and FLOPs that a call cannot avoid, over rates measured in the same run
rows        one operator on one layer at every number of channels: ours, ATen's, the dense call's
goals       what the kernels have to reach, held against the rows
report      tables and JSON
tune        limits of the choice table from measurements
==========  ===============================================================================================
"""
