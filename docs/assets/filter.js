// The table of models: show the rows that hold every word that was typed.
document.addEventListener("input", event => {
  if (event.target.id !== "models-filter") return
  const words = event.target.value.toLowerCase().split(/\s+/)
  let shown = 0
  for (const row of document.querySelectorAll("#models tbody tr")) {
    row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word))
    shown += !row.hidden
  }
  document.getElementById("models-count").textContent = shown
})
