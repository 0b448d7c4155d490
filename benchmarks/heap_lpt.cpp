// Replicas by a max-heap on load / count, each to the lightest GPU with room by a min-heap.
#include <algorithm>
#include <functional>
#include <queue>
#include <utility>
#include <vector>

using Item = std::pair<float, int>;

extern "C" void plan(const float* weight, int layers, int experts, int slots, int gpus,
                     int* phy2log, int* log2phy, int* logcnt) {
  const int most = slots - experts + 1, capacity = slots / gpus;
  auto lighter = [](const Item& a, const Item& b) {
    return a.first < b.first || (a.first == b.first && a.second > b.second);
  };
  auto heavier = [](const Item& a, const Item& b) { return a.first > b.first; };
  std::vector<Item> items(slots);
  for (int layer = 0; layer < layers; layer++) {
    const float* load = weight + (size_t)layer * experts;
    int* expert_of = phy2log + (size_t)layer * slots;
    int* slots_of = log2phy + (size_t)layer * experts * most;
    int* count = logcnt + (size_t)layer * experts;
    std::fill(count, count + experts, 1);
    std::fill(slots_of, slots_of + (size_t)experts * most, -1);

    std::vector<Item> start(experts);
    for (int e = 0; e < experts; e++) start[e] = {load[e], e};
    std::priority_queue<Item, std::vector<Item>, decltype(lighter)> hottest(lighter, start);
    for (int e = 0; e < experts; e++) items[e].second = e;
    for (int spare = experts; spare < slots; spare++) {
      const int e = items[spare].second = hottest.top().second;
      hottest.pop();
      hottest.push({load[e] / ++count[e], e});
    }
    for (auto& [share, e] : items) share = load[e] / count[e];
    std::stable_sort(items.begin(), items.end(), heavier);

    std::priority_queue<Item, std::vector<Item>, std::greater<Item>> lightest;
    for (int g = 0; g < gpus; g++) lightest.push({0.0f, g});
    std::vector<int> held(gpus, 0), seen(experts, 0);
    for (const auto& [share, e] : items) {
      const auto [sum, g] = lightest.top();
      lightest.pop();
      const int slot = g * capacity + held[g]++;
      expert_of[slot] = e;
      slots_of[(size_t)e * most + seen[e]++] = slot;
      if (held[g] < capacity) lightest.push({sum + share, g});
    }
  }
}
