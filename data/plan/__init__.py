"""The planner of Open-Sora-like data: annotations read, each record given a shape or a reason, shapes made into updates.

Facts and figures are those of the Open-Sora sheet; docs/opensora.md says what differs from the originals and why.
"""
