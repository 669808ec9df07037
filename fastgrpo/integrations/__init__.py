"""fastgrpo and other packages' worlds; each module imports its host when it is used."""
