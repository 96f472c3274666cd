"""How an adapter reaches others: a package that is proven before it goes and after it came, and who can load it.

lint, facts, checks                who can load an adapter, and what is wrong with it
package, card, story, curve, plain what is published: files, and what is told of them
scan, sums                         what may not leave; that it came whole
proof, alone                       that a stranger loads what was trained
places, place_*, hub_errors        where it goes
"""
