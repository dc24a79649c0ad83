-- Lift the headings that a cell writes (functions, commands, tables of results) out of the cell's div:
-- only then do they get an entry under "On this page".
local function has_heading(blocks)
  local found = false
  blocks:walk({ Header = function() found = true end })
  return found
end

local function lift(div)
  if not (div.classes:includes("cell") or div.classes:includes("cell-output")) then return nil end
  if not has_heading(div.content) then return nil end
  return div.content
end

return { { Div = lift } }
