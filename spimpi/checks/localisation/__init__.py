"""Where a tensor is wrong, found without gathering it: docs/localisation.md.

``localise`` is the search, ``describe`` the words for what it found.
"""
