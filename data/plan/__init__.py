"""The planner of Open-Sora's data: annotations read, a shape or a reason for each record, shapes made into updates.

Facts and figures are those of the Open-Sora sheet; docs/opensora.md says what differs from the originals and why.
"""
