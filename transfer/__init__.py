"""Where expert weights lie and how they move: mapped files and packs now; device slots and copies later."""
