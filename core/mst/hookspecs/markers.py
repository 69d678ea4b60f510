"""What marks a specification of a hook, and a plugin's implementation of one."""

import pluggy

hookspec = pluggy.HookspecMarker("mst")
hookimpl = pluggy.HookimplMarker("mst")
