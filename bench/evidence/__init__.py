"""What committed results say: `python -m bench report`.

`results` reads folders, one machine each; `bars` holds all bars of DESIGN.md section 8 against them; `paper` the abstract's figures and
published attention rates; `text`, `plots` (`speedup` is one of them, `drawing` what they share) and `readme` show them; `command` is the
command line.
"""
